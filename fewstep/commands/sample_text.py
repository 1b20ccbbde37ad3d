"""`fewstep sample --prompt`: a student beside its teacher from one noise, or what a pipeline itself draws for a seed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.guidance import guided_teacher
from fewstep.commands.gallery import captioned
from fewstep.commands.measure import teacher_product
from fewstep.commands.pictures import in_colour, require_finite, save_picture
from fewstep.commands.report import opened, say, shown_teacher
from fewstep.commands.sources import called, load_pipeline, refuse_pictures
from fewstep.config import UserError
from fewstep.data.cached import with_encoder
from fewstep.data.text import embed
from fewstep.networks.nasa import negative_away, steerable
from fewstep.train.assisted import attended
from fewstep.train.note import read_note

HEUN = 12
"""Steps of a teacher whose recipe evaluates it at none."""
CELL = 128
"""Pixels of a cell's side at least; smaller pictures are enlarged by a whole factor."""

Row = tuple[str, Tensor]
Away = tuple[str, float]
"""A negative prompt and its weight."""


def draw_prompts(
    path: Path,
    prompts: Sequence[str],
    out: Path,
    steps: int | None = None,
    any_steps: bool = False,
    seed: int = 0,
    teacher: int | None = None,
    guidance: float | None = None,
    away: Away | None = None,
    encoder: Path | None = None,
) -> Path:
    """Write a sheet, a column for each prompt.

    Of a run: the teacher by `teacher` Heun steps (0 leaves it out) at `guidance`, and the student, prompt i from noise
    number i of the seed in both; under them what its exported pipeline draws itself. Of a pipeline folder: its own
    picture of prompt i for the generator of seed + i. away: a negative prompt and its weight in the student's
    cross-attention (NASA, arXiv 2412.02687). encoder: folder of the encoder of a run whose prompts were embedded before.

    Raises:
        UserError: a run or a folder that takes no text, or an option that does not belong to it.
    """
    if (path / "recipe.yaml").is_file():
        rows = of_run(path, prompts, steps, any_steps, seed, teacher, guidance, away, encoder)
        told = f"noise 0..{len(prompts) - 1} of seed {seed}"
        if (path / "export" / "model_index.json").is_file():
            rows += of_export(path / "export", prompts, steps, any_steps, seed, rows[0][1].shape)
    else:
        if teacher is not None:
            raise UserError(f"--teacher: {path} is no run directory; only a run knows its teacher")
        if away is not None:
            raise UserError(f"--negative: {path} is no run directory, whose student's attention could be steered")
        if encoder is not None:
            raise UserError(f"--encoder: {path} is no run directory; a pipeline reads prompts by its own text encoder")
        rows = [of_pipeline(path, prompts, steps, any_steps, seed, guidance)]
        told = f"its pipeline's own pictures, seeds {seed}..{seed + len(prompts) - 1}"
    for name, x in rows:
        require_finite(x, f"{path}: {name}")
    save_picture(
        captioned([(n, in_colour(x)) for n, x in rows], list(prompts), max(1, CELL // rows[0][1].shape[-1])), out
    )
    say(f"{out}: {', '.join(n for n, _ in rows)}; {told}")
    return out


def of_run(
    run: Path,
    prompts: Sequence[str],
    steps: int | None,
    any_steps: bool,
    seed: int,
    teacher: int | None,
    guidance: float | None,
    away: Away | None = None,
    encoder: Path | None = None,
) -> list[Row]:
    """(name, images (n, c, h, w) in [-1, 1]) of the teacher and of the student, from the same noises."""
    product = opened(run).with_steps(steps, any_steps)
    recipe: Any = product.recipe
    if product.fitted is not None:
        product.fitted.check_guidance(guidance, "--guidance")
        guidance = product.fitted.guidance
    data, spec = recipe.data, recipe.evaluate
    if getattr(data, "encoder", None) is None:
        raise UserError(f"{run}: was not trained on text (its data has no encoder), so it takes no prompt")
    if product.image is not None:
        raise UserError(
            f"{run}: makes samples from the data's pictures, each with its own text; leave out --prompt, or export it "
            "and call its pipeline with a picture as its card shows"
        )
    if encoder is not None:
        data = with_encoder(data, str(encoder))
    text = embed(data.encoder, prompts, negative=data.negative, zeros=data.zeros, cache=data.text_cache)
    index = torch.arange(len(prompts), device=product.device())
    cond, decode = text.take(index), product.decoder()
    taken = len(product.sampler.steps)
    name = "fitted" if product.fitted is not None else "student"
    drawn = [(f"{name}, {taken} step{'s' * (taken > 1)}", product)]
    many = max(spec.teacher_steps) if teacher is None and spec and spec.teacher_steps else teacher
    if recipe.teacher is not None and many != 0:
        net: Any = shown_teacher(product, data.open(), required=bool(teacher))
    else:
        net = None
    if net is not None:
        scale = guidance if guidance is not None else spec.guidance if spec else getattr(recipe.method, "guidance", None)
        net = guided_teacher(net, float(scale or 1.0), text.null)
        beside = teacher_product(product, net, many or HEUN)
        drawn.insert(0, (beside.title, beside))
    elif teacher:
        raise UserError(f"--teacher: {run} has none")
    rows = [(name, decode(p.images(index, cond, seed)).cpu()) for name, p in drawn]
    if away is not None:
        with steered(product, data, away):
            rows.append((f"{name}, away from {away[0]}", decode(product.images(index, cond, seed)).cpu()))
    return rows


@contextmanager
def steered(product: Any, data: Any, away: Away) -> Iterator[None]:
    """The product's cross-attention with a negative prompt inside. UserError for a network that has none to steer."""
    words, weight = away
    with negative_away(steerable(product.net), attended(product, data, words), weight):
        yield


def of_export(
    folder: Path, prompts: Sequence[str], steps: int | None, any_steps: bool, seed: int, shape: Sequence[int]
) -> list[Row]:
    """The row of a run's exported pipeline, from its own generators of seed + i; a line says why there is none."""
    try:
        _, x = of_pipeline(folder, prompts, steps, any_steps, seed, None)
    except Exception as error:  # the sheet is worth more than its last row: memory, a folder that was changed
        say(f"note: the exported pipeline is left out: {(str(error).splitlines() or [type(error).__name__])[0]}")
        return []
    if x.shape != shape:
        say(f"note: the exported pipeline is left out: it draws {list(x.shape[1:])}, the run {list(shape[1:])}")
        return []
    return [(f"exported, seeds {seed}..{seed + len(prompts) - 1}", x)]


@torch.no_grad()
def of_pipeline(
    path: Path, prompts: Sequence[str], steps: int | None, any_steps: bool, seed: int, guidance: float | None
) -> Row:
    """(name, images (n, c, h, w) in [-1, 1]) as the folder's pipeline draws them when it is called as its card says."""
    if not (path / "model_index.json").is_file():
        raise UserError(f"{path}: neither a run directory (recipe.yaml) nor a diffusers folder (model_index.json)")
    refuse_pictures(path)
    pipeline = load_pipeline(path, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    takes = inspect.signature(pipeline.__call__).parameters
    if "prompt" not in takes:
        raise UserError(f"{path}: a {type(pipeline).__name__} takes no prompt; leave out --prompt")
    if getattr(pipeline, "text_encoder", None) is None or getattr(pipeline, "tokenizer", None) is None:
        raise UserError(f"{path}: has no text encoder and tokenizer, so it cannot read a prompt")
    call: dict[str, Any] = {}
    if steps is not None or read_note(path).sampler is not None:
        _, call = called(path, steps, any_steps)
    call |= {} if guidance is None else {"guidance_scale": guidance}
    pictures = []
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed + i)
        pictures.append(pipeline(prompt=prompt, generator=generator, output_type="pt", **call).images.float().cpu())
    return path.name, 2 * torch.cat(pictures) - 1
