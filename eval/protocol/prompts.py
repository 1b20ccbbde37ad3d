"""Prompt files of the protocols, and the folders in which GenEval and HPSv2 expect images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fewstep.config import UserError
from fewstep.eval.errors import InputError
from fewstep.eval.protocol.preset import Preset
from fewstep.eval.protocol.resize import quantise
from fewstep.files import atomic_path, lines_of, prompt_of, text_of

HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")


def _lines(source: Path) -> list[str]:
    try:
        return lines_of(text_of(source.read_bytes(), source))
    except ValueError as error:
        raise InputError(str(error)) from None


def prompts_of(preset: Preset, path: str | os.PathLike[str]) -> list[str]:
    """The prompt of every global index: prompt i // images_per_prompt; raises as `read_prompts`."""
    per = preset.images_per_prompt
    found = read_prompts(path, -(-preset.number // per))
    return [prompt for prompt in found for _ in range(per)][: preset.number]


def read_prompts(path: str | os.PathLike[str], number: int) -> list[str]:
    """The first `number` prompts of a file: one a line, or a ``.jsonl`` whose objects have a ``prompt``.

    Raises:
        ValueError: fewer prompts than asked for, an empty line among them, or a line that is not such an object.
    """
    source = Path(path)
    lines = _lines(source)
    if len(lines) < number:
        raise InputError(f"{source}: {len(lines)} prompts, {number} are asked for")
    prompts = []
    for index, line in enumerate(lines[:number]):
        prompt: object = line.strip()
        if source.suffix == ".jsonl":
            try:
                prompt = prompt_of(line, f"{source}:{index + 1}")
            except UserError as error:
                raise InputError(str(error)) from None
        if not isinstance(prompt, str) or not prompt:
            raise InputError(f"{source}: line {index + 1} holds no prompt")
        prompts.append(prompt)
    return prompts


def places(preset: Preset, folder: Path) -> list[Path]:
    """Where image i of an export-only preset goes, by its global index."""
    if preset.name == "geneval":
        per = preset.images_per_prompt
        return [folder / f"{i // per:05d}" / "samples" / f"{i % per:05d}.png" for i in range(preset.number)]
    if preset.name == "hpsv2":
        each = preset.number // len(HPSV2_STYLES)
        return [
            folder / style / f"{i:05d}.jpg"  # the name that hpsv2 looks for
            for style in HPSV2_STYLES
            for i in range(each)
        ]
    raise InputError(f"preset {preset.name}: fewstep knows no folder layout for it")


def export_images(
    preset: Preset,
    prompts_file: Path,
    folder: Path,
    generate: Callable[[list[int]], Tensor],
    *,
    batch_size: int = 4,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the images of this rank that are not there yet; returns how many.

    `generate` takes global indices; image i belongs to prompt i // images_per_prompt. GenEval gets its metadata
    line beside the samples and lossless PNGs; HPSv2 reads only JPEG names, so its files are JPEGs of quality 95.

    Raises:
        ValueError: a preset without a layout, or too few prompts.
    """
    targets = places(preset, folder)
    lines = _lines(prompts_file)
    wanted = [i for i in range(rank, preset.number, world_size) if not targets[i].is_file()]
    for start in range(0, len(wanted), batch_size):
        indices = wanted[start : start + batch_size]
        with torch.no_grad():
            pixels = quantise(generate(indices), preset.quantiser)
        for index, image in zip(indices, pixels, strict=True):
            _write(image, targets[index])
            if preset.name == "geneval":
                note = targets[index].parents[1] / "metadata.jsonl"
                with atomic_path(note) as temporary:
                    temporary.write_text(lines[index // preset.images_per_prompt] + "\n", encoding="utf-8")
        if progress:
            progress(len(indices))
    return len(wanted)


def _write(image: Tensor, path: Path) -> None:
    array = image.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    with atomic_path(path) as temporary:
        picture.save(temporary, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}))


def missing(preset: Preset, folder: Path) -> Iterator[Path]:
    """Images of an export that are not there."""
    return (path for path in places(preset, folder) if not path.is_file())
