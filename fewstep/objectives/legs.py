"""Legs of trajectory targets, and the teachers and students that walk them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.guidance import guided
from fewstep.algebra.jump import Solver, ask, solver_step
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import bc
from fewstep.config import config

Leg = Callable[[Tensor, Tensor, Tensor], Tensor]


@config
class Scales:
    """One of a list of guidance scales, each as likely as the others."""

    of: tuple[float, ...]
    """The scales."""

    def __post_init__(self) -> None:
        if not self.of:
            raise ValueError("of is empty; give at least one scale")


@config
class PowerLaw:
    """Guidance scales between two ends, of density w^-power: many small ones and few large (iMF, arXiv 2512.02012)."""

    low: float = 1.0
    """The smallest scale."""
    high: float = 8.0
    """The largest scale (official code: 8)."""
    power: float = 1.0
    """Exponent of the density; 0 is uniform (official code: 1)."""

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"need 0 < low < high, not {self.low}, {self.high}")

    def at(self, u: float | Tensor) -> Any:
        """The scale that a share u in [0, 1] of the draws stays below."""
        if self.power == 1.0:
            return self.low * (self.high / self.low) ** u
        k = 1.0 - self.power
        return (self.low**k + u * (self.high**k - self.low**k)) ** (1 / k)


Scale = float | tuple[float, float] | Scales | PowerLaw
"""A guidance scale, w = 1 is none: a number, or drawn for each sample, uniformly in [low, high], of a list or a law."""


def check_scale(scale: Scale) -> None:
    """Raise ValueError for a range whose ends are in the wrong order."""
    if isinstance(scale, tuple) and scale[0] > scale[1]:
        raise ValueError(f"guidance must be a range low, high, not {list(scale)}")


def drawn(scale: Scale, draws: Any) -> float | Tensor:
    """The scale of each sample, float64 (b,); a number when all have the same, which takes no draw."""
    if isinstance(scale, PowerLaw):
        return scale.at(draws.uniform())
    if isinstance(scale, Scales):
        values = torch.tensor(scale.of, dtype=torch.float64, device=draws.device)
        return values[draws.integers(len(scale.of))] if len(scale.of) > 1 else scale.of[0]
    if isinstance(scale, tuple):
        low, high = scale
        return low if low == high else low + (high - low) * draws.uniform()
    return scale


def ends(scale: Scale) -> tuple[float, float]:
    """The smallest and the largest scale that is drawn."""
    if isinstance(scale, PowerLaw):
        return scale.low, scale.high
    values = scale.of if isinstance(scale, Scales) else scale if isinstance(scale, tuple) else (scale,)
    return min(values), max(values)


def middle(scale: Scale) -> float:
    """What a student that takes the scale is sampled with: the middle of its range or ordered list, a law's median."""
    if isinstance(scale, PowerLaw):
        return float(scale.at(0.5))
    values = sorted(scale.of) if isinstance(scale, Scales) else ends(scale)
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


class Teacher:
    """A guided teacher as net(x, t), with the batch's conditions bound; a leg through `step` and `walk`."""

    def __init__(self, net: Any, batch: Batch, scale: float | Tensor = 1.0, solver: Solver = "ddim") -> None:
        self.net, self.cond, self.null = net, batch.cond, batch.null_cond
        self.scale, self.solver, self.process = scale, solver, net.process

    def __call__(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        return guided(self.net, x, t, self.cond, self.null, self.scale, **call)

    def step(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One solver step; rows with s = t stay as they are."""
        moved = solver_step(self, x, t, s, None, self.solver)
        return torch.where(bc(s, x) == bc(t, x), x.to(moved.dtype), moved)

    def walk(self, steps: int) -> Leg:
        """A leg of `steps` solver steps, evenly spaced in levels u as a sampler's are."""
        process = self.process

        def leg(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            first, last, here = process.level(t), process.level(s), t
            for k in range(1, steps + 1):
                # Even steps in time would leave EDM with one step for all levels below sigma_max / steps.
                there = s if k == steps else process.grid(first + (last - first) * (k / steps))
                x, here = self.step(x, here, there), there
            return x

        return leg


def student_leg(net: Any, cond: Any, **call: Any) -> Leg:
    """The student's own jump as a leg; rows with s = t stay as they are."""
    return lambda x, t, s: ask(net, x, t, s, cond, **call).at(s)


def frozen_leg(net: Any, cond: Any) -> Leg:
    """The net's jump with gradients to x but none to its weights."""
    weights = {n: p.detach() for n, p in net.named_parameters()}

    def call(x: Tensor, t: Tensor, cond: Any = None, **rest: Any) -> Prediction:
        return torch.func.functional_call(net, weights, (x, t, cond), rest)

    call.takes_s = getattr(net, "takes_s", False)  # type: ignore[attr-defined]
    return student_leg(call, cond)


def between(draws: Any, low: Tensor, high: Tensor) -> Tensor:
    """U(low, high) per sample, float64 (b,)."""
    return low + (high - low) * draws.uniform()


def time_between(process: Any, draws: Any, s: Tensor, t: Tensor) -> Tensor:
    """A time whose level is uniform between those of s and t, float64 (b,)."""
    u = between(draws, process.level(s), process.level(t))
    # Rounding of the two maps must not put it outside.
    return process.grid(u).clamp(torch.minimum(s, t), torch.maximum(s, t))
