"""`fewstep gallery`: samples beside their captions, from the data, the teacher and each run, all from one noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.guidance import guided_teacher
from fewstep.commands.measure import teacher_product
from fewstep.commands.pictures import require_finite, save_picture
from fewstep.commands.report import opened
from fewstep.config import UserError
from fewstep.eval.protocol.images import to_pixels
from fewstep.train.product import Product, teacher_beside
from fewstep.train.samples import saturation

LEFT, TOP = 96, 30
"""Pixels for the names of the rows and of the columns."""


def captioned(rows: Sequence[tuple[str, Tensor]], captions: Sequence[str], scale: int = 2) -> Any:
    """A Pillow picture: a row for each (name, images (n, 3, h, w) in [-1, 1]), n captions above the columns."""
    from PIL import Image, ImageDraw, ImageFont

    count, _, height, width = rows[0][1].shape
    if any(x.shape != rows[0][1].shape for _, x in rows) or len(captions) != count:
        raise ValueError(f"rows of {[tuple(x.shape) for _, x in rows]} and {len(captions)} captions do not match")
    cell_h, cell_w = scale * height + 4, scale * width + 4
    sheet = Image.new("RGB", (LEFT + count * cell_w, TOP + len(rows) * cell_h), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for j, caption in enumerate(captions):
        lines = _wrapped(caption, cell_w - 4, lambda s: pen.textlength(s, font))[:2]
        pen.multiline_text((LEFT + j * cell_w + 2, 2), "\n".join(lines), "black", font, spacing=1)
    for i, (name, images) in enumerate(rows):
        top = TOP + i * cell_h
        pen.multiline_text((2, top + cell_h // 2 - 12), name.replace(", ", ",\n"), "black", font, spacing=1)
        for j, pixels in enumerate(to_pixels(images.expand(-1, 3, -1, -1)).permute(0, 2, 3, 1).cpu().numpy()):
            picture = Image.fromarray(pixels).resize((scale * width, scale * height), Image.Resampling.NEAREST)
            sheet.paste(picture, (LEFT + j * cell_w + 2, top + 2))
    return sheet


def _wrapped(text: str, width: float, length: Any) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and length(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def rows_of(runs: Sequence[Path], captions: Sequence[str], steps: Sequence[int], guidance: float, seed: int) -> list[Any]:
    """(name, images) of the data, the guided teacher by each of `steps`, most first, and each run, for captions of the
    first run's data."""
    products = [opened(run) for run in runs]
    recipe = products[0].recipe
    if recipe is None:
        raise UserError(f"{runs[0]}: not a run directory; its recipe tells data and teacher")
    data: Any = recipe.data.open()
    known = [getattr(item, "caption", None) for item in getattr(data, "items", ())]
    unknown = [c for c in captions if c not in known]
    if unknown or not captions:
        raise UserError(f"caption {(unknown or ['(none)'])[0]!r}: is not one of the {len(known)} of {runs[0]}'s data")
    where = torch.tensor([known.index(c) for c in captions])
    cond = data.condition(where)
    drawn: list[tuple[str, Product]] = []
    if recipe.teacher is not None:
        teacher = teacher_beside(recipe, data, products[0].title, products[0].checkpoint)
        for count in sorted(steps, reverse=True):
            many = teacher_product(products[0], guided_teacher(teacher, guidance, data.null), count)
            drawn.append((many.title, many))
    for run, product in zip(runs, products, strict=True):
        drawn.append((run.name, product))
    rows = [(name, p.images(torch.arange(len(where)), cond, seed)) for name, p in drawn]
    for name, x in rows:
        require_finite(x, name)
    return [("data", data.pictures(where)), *rows]


def draw_gallery(
    runs: Sequence[Path], captions: Sequence[str], out: Path, *, steps: Sequence[int], guidance: float, seed: int
) -> list[tuple[str, float | None]]:
    """Write the picture; returns each row's name and how strong its colours are, None of grey samples.

    UserError for captions that the data does not have.
    """
    rows = rows_of(runs, captions, steps, guidance, seed)
    save_picture(captioned(rows, captions), out)
    return [(name, float(saturation(x.clamp(-1, 1))) if x.shape[1] == 3 else None) for name, x in rows]
