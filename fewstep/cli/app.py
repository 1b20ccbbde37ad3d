"""The command line's frame: the app with its two groups, and options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, get_type_hints

import typer

app = typer.Typer(
    name="fewstep",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Distil diffusion and flow models into generators of 1 to 8 network calls.",
    epilog="Start with: `fewstep run digits-dmd2`",
)
recipes = typer.Typer(no_args_is_help=True, help="List, show, copy and check recipes.")
app.add_typer(recipes, name="recipes", rich_help_panel="Look")
methods = typer.Typer(no_args_is_help=True, help="List and show methods.")
app.add_typer(methods, name="methods", rich_help_panel="Look")


def _version(wanted: bool) -> None:
    if wanted:
        from fewstep.commands.version import told

        typer.echo(told())
        raise typer.Exit


@app.callback()
def frame(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print versions and the commit, and leave."),
    ] = False,
) -> None:
    """Distil diffusion and flow models into generators of 1 to 8 network calls."""


def recipe_names(incomplete: str) -> list[str]:
    """For the shell's completion: shipped recipes."""
    from fewstep.recipe.source import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


def method_names(incomplete: str) -> list[str]:
    """For the shell's completion: methods with a card, and the papers' names for them."""
    from fewstep.recipe.cards import cards

    names = [n for c in cards().values() for n in (c.name, *c.aliases)]
    return sorted(n for n in names if n.startswith(incomplete))


RecipeName = Annotated[
    str,
    typer.Argument(help="A shipped recipe's name, or the path of a YAML file.", autocompletion=recipe_names),
]
MethodName = Annotated[str, typer.Argument(help="A method, or a paper's name for one.", autocompletion=method_names)]
Words = Annotated[list[str] | None, typer.Argument(help="Words that must all occur, such as sdxl or lora.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Settings = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, key=value, such as train.steps=200.", metavar="KEY=VALUE"),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Steps = Annotated[int | None, typer.Option(help="Network calls (a teacher: Heun steps).")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Run the code that a recipe or run names.")]
Download = Annotated[
    bool, typer.Option("--download", help="Fetch what is named org/name and not in the Hugging Face cache.")
]
AnySteps = Annotated[bool, typer.Option("--any", help="Allow a number of steps the student was not trained for.")]


def may_run_code(command: Callable[..., None]) -> Callable[..., None]:
    """A command with --trust-code: what it opens may name code, which runs only where that is asked for."""
    own = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)

    @functools.wraps(command)
    def asked(*, trust_code: bool = False, **values: Any) -> None:
        if trust_code:
            from fewstep.networks.code import allow_everything

            allow_everything()
        command(**values)

    named = inspect.Parameter("trust_code", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=TrustCode)
    # As text, the annotation of a parameter would hide from typer what is an option.
    read = [p.replace(annotation=hints[p.name]) for p in own.parameters.values()]
    asked.__signature__ = own.replace(parameters=[*read, named])  # type: ignore[attr-defined]
    asked.__annotations__ = {**hints, "trust_code": TrustCode}
    return asked


def default_of(f: Field[Any]) -> Any:
    """The default of a field as a signature has it."""
    return inspect.Parameter.empty if f.default is MISSING else f.default


def by_fields(command: Callable[[Any], None]) -> Callable[..., None]:
    """A command of one dataclass, as typer reads it: with the fields as its arguments and options.

    Raises:
        TypeError: the dataclass has a list of panels for its help, PANELS, that names what is no field.
    """
    (kind,) = (hint for name, hint in get_type_hints(command).items() if name != "return")
    hints = get_type_hints(kind, include_extras=True)

    @functools.wraps(command)
    def spread(**values: Any) -> None:
        command(kind(**values))

    for name, panel in getattr(kind, "PANELS", {}).items():
        if name not in hints:
            raise TypeError(f"{kind.__name__}.PANELS: {name!r} is no field")
        hints[name].__metadata__[0].rich_help_panel = panel
    told = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(f.name, told, default=default_of(f), annotation=hints[f.name]) for f in fields(kind)]
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = hints
    return spread
