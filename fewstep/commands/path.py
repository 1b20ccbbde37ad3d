"""`fewstep sample --path`: what teacher and student take for the clean sample at every step (arXiv 2503.10637)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.condition import moved
from fewstep.algebra.guidance import guided_teacher
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.sampling import sample, seeded
from fewstep.commands.gallery import captioned
from fewstep.commands.measure import teacher_product
from fewstep.commands.pictures import in_colour, require_finite, save_picture
from fewstep.commands.report import say, shown_teacher
from fewstep.config import UserError
from fewstep.train.product import Product

MOST = 16
"""Samples of a sheet."""


@torch.no_grad()
def steps_of(product: Product, labels: Any, count: int, seed: int) -> Tensor:
    """(steps, count, c, h, w): x0 at every level, decoded where there is a VAE, on the CPU."""
    device = product.device()
    start, fresh = seeded(seed, torch.arange(count, device=device), product.shape)
    seen: list[Tensor] = []

    def keep(_: int, prediction: Prediction) -> None:
        seen.append(prediction.x0)

    sample(product.sampler, product.net, start, moved(labels, device), fresh, seen=keep)
    decode = product.decoder()
    return torch.stack([decode(x).cpu() for x in seen])


def draw_path(product: Product, labels: Any, count: int, seed: int, out: Path, teacher: int | None) -> Path:
    """Write a sheet: for every sample a row of the teacher's x0s, where the product knows one, and of its own.

    teacher: its Heun steps, as many as the product's when left out; 0 leaves it out. UserError for no pictures.
    """
    if len(product.picture_shape()) != 3:
        raise UserError(f"--path: shows pictures; these samples are {list(product.shape)}")
    if not 1 <= count <= MOST:
        raise UserError(f"--count {count}: a path shows 1 to {MOST} samples, a row or two each")
    shown = [("fitted" if product.fitted is not None else "student", steps_of(product, labels, count, seed))]
    recipe: Any = product.recipe
    if recipe is not None and recipe.teacher is not None and product.fitted is None and teacher != 0:
        data = recipe.data.open()
        net: Any = shown_teacher(product, data, required=bool(teacher))
        if net is not None:
            net = guided_teacher(net, recipe.shown_guidance(), data.null)
            many = teacher_product(product, net, teacher or len(product.sampler.steps))
            shown.insert(0, ("teacher", steps_of(many, labels, count, seed)))
    elif teacher:
        raise UserError(f"--teacher: {product.title} has none beside it")
    length = max(len(x) for _, x in shown)
    rows = [(f"{name} {i}", _filled(x[:, i], length)) for i in range(count) for name, x in shown]
    for name, x in rows:
        require_finite(x, name)
    captions = [f"step {i + 1}" for i in range(length)]
    save_picture(captioned(rows, captions, max(1, 48 // rows[0][1].shape[-1])), out)
    say(f"{out}: x0 at every step of {', '.join(name for name, _ in shown)}, {count} samples of seed {seed}")
    return out


def _filled(x: Tensor, length: int) -> Tensor:
    """x (n, c, h, w) in three channels, with white pictures up to `length`."""
    x = in_colour(x)
    return torch.cat([x, torch.ones(length - len(x), *x.shape[1:])])
