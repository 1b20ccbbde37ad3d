"""Commands that measure: generators, teachers, the judge of captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app, by_fields, may_run_code
from fewstep.commands.request import Request


@app.command(
    rich_help_panel="Measure",
    name="eval",
    epilog="Examples:\n\n"
    "`fewstep eval runs/digits-dmd2 --samples 5000`\n\n"
    "`fewstep eval runs/digits-dmd2 --preset digits --teacher 1,12 --report report`\n\n"
    "`fewstep eval runs/mine --against photos --samples 1000`\n\n"
    "`fewstep eval my-pipeline --preset coco30k --steps 4 --call guidance_scale=1.0`\n\n"
    "`fewstep eval --images folder --preset fashion-mnist --allow-skips`\n\n"
    "`fewstep eval my-pipeline --preset geneval --steps 4 --out geneval-images`\n\n"
    "`fewstep eval --selftest`\n\n"
    "Several processes: `python -m torch.distributed.run --nproc-per-node 2 -m fewstep eval ...`",
)
@may_run_code
@by_fields
def evaluate(request: Request) -> None:
    """Measure a run, an export, a diffusers folder or a folder of images."""
    if request.selftest:
        from fewstep.commands.selftest import check

        check()
    elif request.list_presets:
        from fewstep.commands.presets import list_presets

        list_presets()
    else:
        from fewstep.commands.evaluate import run

        run(request)


@app.command(
    "check-teacher",
    rich_help_panel="Measure",
    epilog="Example: `fewstep check-teacher my-sdxl --size 128x128`",
)
def check_teacher(
    path: Annotated[
        str, typer.Argument(help="A diffusers pipeline folder, assets:NAME, or org/name in the Hugging Face cache.")
    ],
    size: Annotated[
        str | None, typer.Option(help="Height x width of x (latents, where there is a VAE), such as 64x64.")
    ] = None,
    prediction: Annotated[
        str | None, typer.Option(help="epsilon, v_prediction or sample, where the scheduler does not say.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale that the network takes as an input.")] = None,
    wrapper: Annotated[str | None, typer.Option(help="A wrapper of your own, file.py:Class; its code is run.")] = None,
    classes: Annotated[int | None, typer.Option(help="Classes beside the null class.")] = None,
) -> None:
    """Try every convention of a teacher: schedule, prediction, time, guidance, latents, samples, tangents.

    Prints each finding and a verdict in words. Exit code 0 when the folder is read right, 1 when it is not.
    """
    from fewstep.commands.check_teacher import main as check

    told = {"prediction": prediction, "guidance": guidance, "wrapper": wrapper, "classes": classes}
    raise typer.Exit(check(path, size=size, **told))


@app.command(
    "check-student",
    rich_help_panel="Measure",
    epilog="Example: `fewstep check-student runs/sd3-dmd2/export`",
)
def check_student(
    path: Annotated[str, typer.Argument(help="A folder by `fewstep export`.")],
) -> None:
    """Compare the noise levels at which the installed diffusers calls a student with those that it was trained at.

    Its pipeline draws once as its card says, without the network's weights. Exit code 0 when the levels agree; 1, with
    the remedy, when they do not.
    """
    from fewstep.commands.check_student import main as check

    raise typer.Exit(check(path))


@app.command(
    "train-retrieval",
    rich_help_panel="Measure",
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
    "make-reference",
    rich_help_panel="Measure",
    epilog="Example: `fewstep make-reference val2014 --preset coco30k --grey-to-colour`",
)
def make_reference(
    folder: Annotated[Path, typer.Argument(help="The real images; sizes may differ where the preset resizes them.")],
    preset: Annotated[str, typer.Option(help="A protocol whose reference is a file, shipped or a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="File to write [default: where the preset looks for it].")] = None,
    extractor_path: Annotated[Path | None, typer.Option(help="Weights of the preset's feature network.")] = None,
    grey_to_colour: Annotated[bool, typer.Option("--grey-to-colour", help="Take grey files in a colour preset.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images of one pass.")] = 32,
    size: Annotated[
        int | None, typer.Option(min=8, help="First resize the middle square of every image to the samples' size.")
    ] = None,
    keep_features: Annotated[
        bool, typer.Option("--keep-features", help="Keep the features too: KID and precision need them.")
    ] = False,
) -> None:
    """Compute the statistics of real images that a preset compares with, through its own resize and network."""
    from fewstep.commands.make_reference import make_reference as job

    path, count = job(
        folder,
        preset,
        out=out,
        extractor_path=extractor_path,
        grey_to_colour=grey_to_colour,
        batch=batch,
        size=size,
        keep_features=keep_features,
    )
    typer.echo(f"{path}: statistics of {count} images")


def bench_names(incomplete: str) -> list[str]:
    """For the shell's completion: the benchmarks."""
    from fewstep.commands.bench import benches

    return [name for name in benches() if name.startswith(incomplete)]


@app.command(
    rich_help_panel="Measure",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: `fewstep bench trainer`; its own options go behind two dashes: `fewstep bench trainer -- --help`",
)
def bench(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="The benchmark; left out: their names.", autocompletion=bench_names)
    ] = None,
) -> None:
    """Measure what something costs on this machine, in a process of its own."""
    from fewstep.commands.bench import benches, run_bench

    if name is None:
        typer.echo("\n".join(benches()))
    else:
        raise typer.Exit(run_bench(name, context.args))
