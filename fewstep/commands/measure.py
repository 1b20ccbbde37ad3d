"""A product measured by this process, at the end of a run or in the middle of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fewstep.algebra.sampling import many_step
from fewstep.commands.judge import Judge
from fewstep.commands.own_grid import teacher_levels
from fewstep.commands.progress import drawing, silent
from fewstep.commands.sources import BATCH, of_product
from fewstep.config import UserError
from fewstep.eval.errors import InputError
from fewstep.eval.protocol.evaluation import Evaluation
from fewstep.eval.protocol.latency import seconds_per_1000
from fewstep.eval.protocol.runner import make_samples
from fewstep.train.product import Product


def teacher_product(product: Product, teacher: Any, steps: int) -> Product:
    """The teacher of a run under a Heun sampler, with the run's shape and classes, on the grid that its recipe asks for.

    UserError where that is the teacher's own and it has none of so many steps.
    """
    title, sampler = f"teacher, {steps} step{'s' * (steps > 1)}", many_step(steps)
    asked: Any = product.recipe.evaluate if product.recipe is not None else None
    if asked is not None and asked.teacher_grid == "own":
        levels = teacher_levels(product.recipe, teacher, tuple(product.shape[1:]), steps)
        title, sampler = f"{title} of its own grid", replace(sampler, steps=levels)
    return replace(product, net=teacher, sampler=sampler, title=title, trained=None)


def measure(
    product: Product,
    judge: Judge,
    *,
    batch: int = BATCH,
    timed: bool = True,
    say: Callable[[str], None] = silent,
    console: Console | None = None,
) -> tuple[Evaluation, Tensor]:
    """Draw the preset's samples and measure them; returns the numbers and the samples, on the CPU.

    timed: also how long 1,000 take, for which up to four more batches are drawn.
    say, console: where it tells how far it is (`progress.drawing`).

    Raises:
        UserError: samples that are not finite.
    """
    model = of_product(judge.preset, product, product.title, name=product.title)
    drawn: list[Tensor] = []
    sets = []
    with drawing(product.title, judge.preset.number * judge.preset.repetitions, say, console) as told:
        for repetition in range(judge.preset.repetitions):
            make = model.generate(repetition)

            def generate(indices: list[int], make: Any = make, first: bool = repetition == 0) -> Tensor:
                x = make(indices).cpu()
                if first:
                    drawn.append(x)
                told(len(indices))
                return x

            try:
                sets.append(make_samples(judge.job(batch), generate, judge.extractor, judge.clip_images))
            except InputError as error:
                raise UserError(f"{product.title}: {error}; nothing was measured") from None
    seconds = None
    if timed:
        seconds = seconds_per_1000(model.generate(0), list(range(min(batch, judge.preset.number))))
    return judge.evaluate(model, sets, seconds=seconds), torch.cat(drawn)
