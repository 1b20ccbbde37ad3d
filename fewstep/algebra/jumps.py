"""Rollouts of a flow map in at most three jumps, whatever its number of steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.draws import Draws
from fewstep.algebra.jump import ask, clean, times_of
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import Process
from fewstep.algebra.rollout import Rollout, exit_step
from fewstep.config import Count, config


@config
class Jumps:
    """On-policy samples of a flow map at any number of steps: to one of the steps, over it, and from its end to x0.

    What lies before and after the step is one jump each, so that a sample of 50 steps costs three calls.
    """

    cites: ClassVar[tuple[str, ...]] = ("2605.13724",)

    counts: tuple[Count, ...] = (2, 4, 8, 16, 50)
    """Numbers of even steps, one drawn for each update (official code)."""
    grad: Literal["all", "step"] = "all"
    """all: the gradient flows through every jump (official code); step: not through the one before the step."""

    def __post_init__(self) -> None:
        if not self.counts:
            raise ValueError("counts is empty; give at least one number of steps")

    def draw(self, draws: Draws) -> tuple[tuple[float, ...], int]:
        """(levels u that the jumps start from, which of them is the step's), the same for every sample of an update."""
        count = self.counts[exit_step(draws, len(self.counts))]
        step = exit_step(draws, count)
        levels = dict.fromkeys((1.0, 1 - step / count, *([1 - (step + 1) / count] if step + 1 < count else [])))
        return tuple(levels), min(step, 1)


def jumped(
    student: Callable[..., Prediction],
    draws: Draws,
    shape: tuple[int, ...],
    jumps: Jumps,
    cond: Any = None,
    *,
    grad: bool = True,
) -> Rollout:
    """AnyFlow's on-policy rollout (arXiv 2605.13724): e -> x_t -> x_r -> x0 for a step t -> r of N even steps.

    Args:
        student: a denoiser with a `process` that takes its destination.
        shape: of one sample, (C, H, W) or (d,).
        jumps: the numbers of steps, of which one is drawn, and how far back the gradient goes.
        grad: False runs every call without a graph.
    """
    process: Process = student.process  # type: ignore[attr-defined]
    levels, step = jumps.draw(draws)
    times: list[Tensor] = [t.expand(len(draws)) for t in times_of(levels, process).to(draws.device)]
    x = process.prior(draws.normal(*shape), times[0])
    for i, (t, s) in enumerate(pairwise(times)):
        with nullcontext() if grad and (jumps.grad == "all" or i >= step) else torch.no_grad():
            x = ask(student, x, t, s, cond).at(s)
    with nullcontext() if grad else torch.no_grad():
        return Rollout(ask(student, x, times[-1], clean(process, times[-1]), cond).x0, x, times[-1])
