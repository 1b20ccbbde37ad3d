"""Commands whose result leaves fewstep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import Force, app, may_run_code


@app.command(rich_help_panel="Ship", epilog="Example: `fewstep export runs/digits-dmd2 --out my-pipeline`")
@may_run_code
def export(
    run: Annotated[Path, typer.Argument(help="A run directory, or a folder by `fewstep fit`.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write [default: RUN/export].")] = None,
    force: Force = False,
    steps: Annotated[
        int | None, typer.Option(help="Of a fit, or a student of several lists of steps: which number.")
    ] = None,
    lora: Annotated[
        bool,
        typer.Option("--lora", help="Write the adapter alone, as diffusers' load_lora_weights reads it."),
    ] = False,
    layout: Annotated[
        str, typer.Option("--format", help="Layout of the adapter's file: diffusers, kohya or comfyui.")
    ] = "diffusers",
    dtype: Annotated[str, typer.Option(help="Of a pipeline student's weights: fp32, bf16 or fp16.")] = "fp32",
    variant: Annotated[
        bool, typer.Option("--variant", help="Name files after --dtype: from_pretrained(..., variant='fp16').")
    ] = False,
    image_to_image: Annotated[
        float | None,
        typer.Option(help="Write the pipeline that goes on from a picture noised to this trained level, such as 0.75."),
    ] = None,
) -> None:
    """Write a folder that plain diffusers opens, checked against fewstep's own sampler."""
    from fewstep.commands.export import export_run

    export_run(run, out, force, lora, layout, dtype, steps, variant, image_to_image)


@app.command(
    rich_help_panel="Ship", epilog="Example: `fewstep extract runs/mine --rank 64 --out runs/mine/lora --measure`"
)
@may_run_code
def extract(
    run: Annotated[Path, typer.Argument(help="A run directory whose student was trained whole.")],
    rank: Annotated[int, typer.Option(help="Of the LoRA set.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Folder to write; left out: only what it would keep is told.")] = None,
    layout: Annotated[
        str, typer.Option("--format", help="Layout of the file: diffusers, kohya or comfyui.")
    ] = "diffusers",
    measure: Annotated[bool, typer.Option("--measure", help="Also measure both by the run's own metric.")] = False,
    force: Force = False,
) -> None:
    """Write a whole student as a LoRA set on its teacher: the nearest of a rank, layer by layer, and what that loses."""
    from fewstep.commands.extract import extract as job
    from fewstep.export.choose import check_options

    check_options(True, "fp32", layout, False)
    for line in job(run, rank, out, layout, measure=measure, force=force):
        typer.echo(line)


@app.command(
    rich_help_panel="Ship",
    epilog="Examples:\n\n"
    "`fewstep push runs/mine/export org/mine-4step --dry-run`\n\n"
    "`fewstep push runs/mine/export org/mine-4step --private --revision v1`",
)
def push(
    folder: Annotated[Path, typer.Argument(help="What `fewstep export` wrote.")],
    name: Annotated[str, typer.Argument(help="The repository on the hub, org/name; made where it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made where it is not there [default: main].")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, upload nothing; needs no token.")] = False,
) -> None:
    """Upload an export to the Hugging Face hub, with the token of `hf auth login` or HF_TOKEN.

    Only files that fewstep wrote go. The card may be edited before; that of a pipeline's student has to name its licence
    and its base model.
    """
    from fewstep.commands.push import push as job

    for line in job(folder, name, private=private, revision=revision, message=message, dry_run=dry_run):
        typer.echo(line)


@app.command(
    rich_help_panel="Ship",
    epilog="Example: `fewstep invert runs/digits-icd pictures --out codes.safetensors --classes 3`",
)
@may_run_code
def invert(
    run: Annotated[Path, typer.Argument(help="A run directory of the method icd.")],
    images: Annotated[Path, typer.Argument(help="A picture, or a folder of them; sub-folders are classes.")],
    out: Annotated[Path, typer.Option(help="Codes, as safetensors.")] = Path("codes.safetensors"),
    classes: Annotated[str | None, typer.Option(help="Classes of the pictures in turn, such as 3 or 0-9.")] = None,
) -> None:
    """Encode real images to noise that the run's student decodes to them again."""
    from fewstep.commands.invert import invert_run

    error = invert_run(run, images, out, classes).error
    typer.echo(
        f"{len(error)} images in {out}; decoded again they differ by {float(error.mean()):.3g} (root mean square "
        f"in [-1, 1]; worst {float(error.max()):.3g}): {out.with_suffix('.png')}"
    )
