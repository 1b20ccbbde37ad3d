"""`fewstep sample`: a grid of samples as a PNG."""

from __future__ import annotations

from pathlib import Path

import torch

from fewstep.commands.options import parse_classes
from fewstep.commands.pictures import save_grid
from fewstep.commands.report import console
from fewstep.config import UserError
from fewstep.train.product import open_product


def draw(path: Path, steps: int | None, classes: str | None, count: int, seed: int, out: Path, any_steps: bool) -> Path:
    """`fewstep sample`: a PNG grid."""
    product = open_product(path).with_steps(steps, any_steps)
    labels, per_row = None, 10
    if product.classes:
        wanted = parse_classes(classes or f"0-{product.classes - 1}", product.classes)
        labels = torch.tensor([wanted[i % len(wanted)] for i in range(count)])
        per_row = min(len(wanted), 10)
    elif classes is not None:
        parse_classes(classes, 0)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: must end in .png")
    x = product.draw(count, seed, labels)
    save_grid(x, out, per_row)
    console.print(f"{count} samples in {len(product.sampler.steps)} steps: {out}")
    return out
