"""Commands that train, and what a run will need."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import Download, Force, RecipeName, Settings, app, by_fields, may_run_code, recipe_names
from fewstep.commands.fit_request import FitRequest


class Weights(StrEnum):
    """What `fewstep plan` builds the networks from."""

    read = "read"
    none = "none"


@app.command(
    rich_help_panel="Train",
    epilog="Examples:\n\n"
    "`fewstep run digits-dmd2 train.steps=100 --out runs/short`\n\n"
    "`fewstep run mine.yaml teacher.path=org/name teacher.revision=v1.0 --download`",
)
@may_run_code
def run(
    recipe: RecipeName,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Run directory [default: runs/NAME].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that directory.")] = False,
    force: Force = False,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Go on from another run or its checkpoint RUN/step-N with these settings."),
    ] = None,
    download: Download = False,
) -> None:
    """Train a recipe, sample it, export it and measure it against its teacher.

    Exit code 0; 2 for a mistake, before anything is trained; 3 when it was trained but its measurement or its export
    failed, which a printed command repeats; 4 when train.guard ended it; 130 when it was stopped, with the command that
    goes on.
    """
    from fewstep.commands.run import run_recipe

    run_recipe(recipe, settings or [], out, resume, force, start, download)


@app.command(
    rich_help_panel="Train",
    epilog="Examples:\n\n"
    "`fewstep new --data photos --steps 1 --method dmd2 --out mine.yaml`\n\n"
    "`fewstep new --teacher my-sdxl --steps 4 --lora --prompts prompts.txt --out mine.yaml`",
)
def new(
    out: Annotated[Path, typer.Option(help="Recipe to write, NAME.yaml; others are written beside it.")],
    steps: Annotated[int, typer.Option(help="Network calls of the student.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of pictures; sub-folders are classes. Or one of `fewstep cache-latents`.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Folder of a diffusers pipeline, or org/name in the Hugging Face cache; left out: one is trained."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="dmd2, sid or consistency; a pipeline: dmd2.")] = "dmd2",
    lora: Annotated[bool, typer.Option("--lora", help="Train LoRA sets and not whole networks.")] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line, for a run without pictures.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of one device, such as 24G: settings are chosen whose plan fits.")
    ] = None,
    force: Force = False,
) -> None:
    """Write recipes for your own pictures or pipeline, with a comment on every line that says where it comes from."""
    from fewstep.commands.new import Wish, new as job

    for line in job(Wish(out, steps, data, teacher, method, lora, prompts, force, memory)):
        typer.echo(line)


@app.command(
    rich_help_panel="Train",
    epilog="Examples:\n\n"
    "`fewstep fit assets:digits-teacher --preset fd-house-digits --out runs/fitted`\n\n"
    "`fewstep fit mine.yaml --calls 4,8 --guidance 2 --out runs/fitted`\n\n"
    "`fewstep sample runs/fitted --steps 4`",
)
@may_run_code
@by_fields
def fit(request: FitRequest) -> None:
    """Fit levels and history to a frozen teacher for a few calls: no training, and the baseline of every student."""
    from fewstep.commands.fit import run as job

    job(request)


@app.command(rich_help_panel="Train", epilog="Example: `fewstep probe mine.yaml --remove 8`")
def probe(
    network: Annotated[str, typer.Argument(help="A recipe, for its teacher, or a run directory, for what it trained.")],
    samples: Annotated[int, typer.Option(help="Samples of the data that are looked at, each at one noise level.")] = 256,
    remove: Annotated[int | None, typer.Option(help="Take this many blocks away, at the least loss.")] = None,
    accept: Annotated[float, typer.Option(help="Without --remove: the most that a run of blocks may lose.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of samples and noise.")] = 0,
) -> None:
    """Propose runs of blocks that one block could do (PPCL), for a student `pruned`; nothing is trained."""
    from fewstep.commands.probe import probe as job, show

    show(network, job(network, samples=samples, remove=remove, accept=accept, seed=seed))


@app.command(
    rich_help_panel="Train",
    epilog="Examples:\n\n"
    "`fewstep plan digits-dmd2 train.batch=512`\n\n"
    "`fewstep plan paper/dmd2-sdxl-4step-lora --weights none --shape 4x128x128 --text 77x2048`",
)
def plan(
    recipe: RecipeName,
    settings: Settings = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of the launch.")] = 1,
    measure: Annotated[bool, typer.Option("--measure", help="Also take two real steps and compare.")] = False,
    weights: Annotated[
        Weights, typer.Option(help="none: from configs alone; without weights, latents or texts on disk.")
    ] = Weights.read,
    shape: Annotated[str | None, typer.Option(help="Of x, with --weights none [default: the family's].")] = None,
    text: Annotated[str | None, typer.Option(help="Tokens x width, with --weights none [default: the family's].")] = None,
    download: Download = False,
) -> None:
    """Estimate the memory of a run before it is launched, and which switches lower it.

    With `--weights none` a teacher's folder needs its configs only, and one that is not here may have the name of a
    repository whose configs ship with fewstep (`assets:configs/NAME`).

    Exit code 0; 2 for a mistake; 3 where the recipe names code, which is never run here: then what needs none of it is
    estimated, and the rest is named.
    """
    from fewstep.commands.plan_configs import sizes_of
    from fewstep.commands.plan_report import report
    from fewstep.config import UserError

    sizes = sizes_of(shape, text)
    if weights is Weights.read and (shape or text):
        raise UserError(f"{'--shape' if shape else '--text'}: is for --weights none; else the data say it")
    bare = sizes if weights is Weights.none else None
    if report(recipe, settings or [], processes, measure, bare, download) is None:
        raise typer.Exit(3)


@app.command(
    rich_help_panel="Train",
    epilog="Example: `fewstep compare digits-dmd2 digits-cd --budget updates=500 --out runs/compare`",
)
@may_run_code
def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(help="Shipped recipes or YAML files; they must share one metric.", autocompletion=recipe_names),
    ],
    budget: Annotated[
        str,
        typer.Option(
            help="What every run may spend: own (as many updates as its recipe asks for), updates=N (of the student), "
            "seconds=S (of training) or calls=C (network forward passes of one sample; a backward pass counts two)."
        ),
    ],
    seeds: Annotated[int, typer.Option(help="Runs of each recipe, with seeds 0, 1, ...")] = 2,
    steps: Annotated[
        str | None,
        typer.Option(help="Measure also at these numbers of steps, such as 1,2,4, where a student allows them."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Samples of each measurement.")] = None,
    curve: Annotated[
        int,
        typer.Option(
            help="Measure each run so often, evenly over its last stage, and at the end of the one before; not charged."
        ),
    ] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A change to every recipe, such as train.batch=32.", metavar="KEY=VALUE"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs and the report.")] = Path("runs/compare"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue there; recipes and seeds may be added.")] = False,
) -> None:
    """Train several recipes under one budget, measure them alike and rank them with errors."""
    from fewstep.commands.compare.compare import compare as job
    from fewstep.commands.options import parse_steps

    job(recipes, budget, seeds, out, resume, settings or [], parse_steps(steps), samples, curve)
