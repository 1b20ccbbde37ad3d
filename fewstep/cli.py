"""The command line. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="fewstep",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Distil diffusion and flow models into generators of 1 to 8 network calls.",
    epilog="Start with: `fewstep run digits-dmd2`",
)
recipes = typer.Typer(no_args_is_help=True, help="List, show, copy and check recipes.")
app.add_typer(recipes, name="recipes")
methods = typer.Typer(no_args_is_help=True, help="List and show methods.")
app.add_typer(methods, name="methods")

Settings = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, key=value, such as train.steps=200.", metavar="KEY=VALUE"),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Steps = Annotated[int | None, typer.Option(help="Network calls (a teacher: Heun steps).")]
AnySteps = Annotated[
    bool, typer.Option("--any", help="Allow a number of steps the student was not trained for.")
]


@app.command(epilog="Example: `fewstep run digits-dmd2 train.steps=100 --out runs/short`")
def run(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or the path of a YAML file.")],
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Run directory [default: runs/NAME].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that directory.")] = False,
    force: Force = False,
) -> None:
    """Train a recipe, sample it, measure it against its teacher and export it."""
    from fewstep.jobs import run_recipe

    run_recipe(recipe, settings or [], out, resume, force)


@app.command(epilog="Example: `fewstep sample runs/digits-dmd2 --classes 0-9 --out grid.png`")
def sample(
    path: Annotated[Path, typer.Argument(help="A run directory, an export or a diffusers folder.")],
    steps: Steps = None,
    classes: Annotated[
        str | None, typer.Option(help="Classes to draw in turn, such as 0-9 or 1,4,7.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the noise; each sample has its own.")] = 0,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("grid.png"),
    any_steps: AnySteps = False,
) -> None:
    """Draw a grid of samples as a PNG."""
    from fewstep.jobs import draw

    draw(path, steps, classes, count, seed, out, any_steps)


@app.command(name="eval", epilog="Example: `fewstep eval runs/digits-dmd2 --samples 5000`")
def evaluate(
    path: Annotated[Path, typer.Argument(help="A run directory, an export or a diffusers folder.")],
    steps: Steps = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Number of samples.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.")] = None,
    any_steps: AnySteps = False,
) -> None:
    """Measure a run, an export or a diffusers folder."""
    from fewstep.jobs import evaluate as job

    job(path, steps, samples, seed, any_steps)


@app.command(
    epilog="Example: `fewstep compare digits-dmd2 digits-cd --budget updates=500 --out runs/compare`"
)
def compare(
    recipes: Annotated[
        list[str], typer.Argument(help="Shipped recipes or YAML files; they must share one metric.")
    ],
    budget: Annotated[
        str,
        typer.Option(
            help="What every run may spend: updates=N (of the student), seconds=S (of training) or calls=C "
            "(network forward passes of one sample; a backward pass counts two)."
        ),
    ],
    seeds: Annotated[int, typer.Option(help="Runs of each recipe, with seeds 0, 1, ...")] = 2,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Measure also at these numbers of steps, such as 1,2,4, where a student allows them."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Samples of each measurement.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A change to every recipe, such as train.batch=32.", metavar="KEY=VALUE"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs and the report.")] = Path("runs/compare"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue there; recipes and seeds may be added.")
    ] = False,
) -> None:
    """Train several recipes under one budget, measure them alike and rank them with errors."""
    from fewstep.compare import compare as job
    from fewstep.product import parse_steps

    job(recipes, budget, seeds, out, resume, settings or [], parse_steps(steps), samples)


@app.command(epilog="Example: `fewstep export runs/digits-dmd2 --out my-pipeline`")
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write [default: RUN/export].")] = None,
    force: Force = False,
) -> None:
    """Write a folder that plain diffusers opens, checked against fewstep's own sampler."""
    from fewstep.jobs import export_run

    export_run(run, out, force)


@recipes.command("ls")
def recipes_ls() -> None:
    """List shipped recipes."""
    from fewstep.listing import list_recipes

    list_recipes()


@recipes.command("show", epilog="Example: `fewstep recipes show toy/dmd2 method.steps=[1.0,0.5]`")
def recipes_show(name: str, settings: Settings = None) -> None:
    """Print a recipe with every default filled in."""
    from fewstep.recipe import dump, load

    typer.echo(dump(load(name, settings or [])), nl=False)


@recipes.command("cp", epilog="Example: `fewstep recipes cp digits-dmd2 mine.yaml`")
def recipes_cp(name: str, to: Path, force: Force = False) -> None:
    """Copy a shipped recipe to a file of your own."""
    from fewstep.config import UserError
    from fewstep.recipe import find

    if to.exists() and not force:
        raise UserError(f"{to}: exists; overwrite it with --force")
    if to.suffix not in (".yaml", ".yml"):
        raise UserError(f"{to}: a recipe's name ends in .yaml")
    if not to.parent.is_dir():
        raise UserError(f"{to.parent}: no such folder")
    to.write_text(find(name).read_text())
    typer.echo(f"{to}: run it with `fewstep run {to}`")


@recipes.command("check", epilog="Example: `fewstep recipes check mine.yaml`")
def recipes_check(name: str, settings: Settings = None) -> None:
    """Check a recipe and print all its problems, or the stages it would run."""
    from fewstep.recipe import load

    recipe = load(name, settings or [])
    for stage in recipe.stages():
        typer.echo(f"{name}: {stage.method.name}, {stage.steps} steps")


@methods.command("ls")
def methods_ls() -> None:
    """List methods with what they need."""
    from fewstep.listing import list_methods

    list_methods()


@methods.command("show", epilog="Example: `fewstep methods show phased_dmd`")
def methods_show(name: str) -> None:
    """Print a method's card: equation, roles, deviations from its paper, numbers, known failures."""
    from fewstep.cards import show

    typer.echo(show(name))


@app.command(epilog="Example: `fewstep cite digits-dmd2`")
def cite(recipe: str) -> None:
    """Print BibTeX of the papers behind a recipe."""
    from fewstep.cards import cite as entries

    typer.echo(entries(recipe))


@app.command(epilog="Example: `fewstep health runs/digits-dmd2`")
def health(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Say in words whether a run is healthy, from its log, and which knob to turn."""
    from fewstep.health import report

    typer.echo(report(run))


def main(argv: list[str] | None = None) -> Any:
    """Entry point: a mistake of the user is one clear message on stderr and exit code 2."""
    from fewstep.config import RecipeError, UserError

    try:
        return app(argv, standalone_mode=True)
    except (RecipeError, UserError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a full disk, a missing right, a folder where a file should be
        if error.errno is None:
            raise
        full = error.errno == errno.ENOSPC
        reason = "the disk is full; free some space and --resume" if full else error.strerror
        typer.echo(f"error: {error.filename or 'output'}: {reason}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
