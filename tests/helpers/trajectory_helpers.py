"""Exact flow maps as students, for the tests of the trajectory family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import EDM, VP, Flow, Process, Trig
from fewstep.networks.analytic import flow_map, gaussian
from fewstep.objectives.trajectory import chord_x0

F64 = torch.float64
MEAN, STD = 0.7, 0.4
# sigma_min is almost 0: in EDM a sample stands at sigma_min while x0 stands at 0, and here they must agree.
TIGHT = EDM(sigma_min=1e-6)
FOUR: dict[str, Process] = {"flow": Flow(), "edm": EDM(), "vp": VP(), "trig": Trig()}


class ExactMap(nn.Module):
    """The flow map of N(MEAN, STD^2) as a student that takes its destination: the chord's denoiser."""

    takes_s = True
    inputs = ("s",)

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process
        self.inner = gaussian(process, MEAN, STD)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, s: Tensor | None = None, **call: Any) -> Prediction:
        if s is None:
            return self.inner(x, t)
        there = s != t
        # A where would carry a zero tangent to s = 0, where VP's slope is infinite.
        apart = s if bool(there.all()) else torch.where(there, s, torch.where(t > 0, t * 0.5, t + 0.1))
        moved = flow_map(self.process, MEAN, STD, x, t, apart)
        x0 = chord_x0(self.process, x, t, moved, apart)
        here = self.inner(x, t).x0
        shape = (-1, *(1,) * (x.ndim - 1))
        return from_x0(self.process, x, t, torch.where(there.reshape(shape), x0, here))


def exact_leg(process: Process) -> Any:
    """The exact teacher as a leg."""
    return lambda x, t, s: flow_map(process, MEAN, STD, x, t, s)


def draws(count: int, *name: int | str) -> Draws:
    return Draws(fold("trajectory tests", *name), torch.arange(count))


def noisy(process: Process, t: Tensor, *name: int | str) -> Tensor:
    """Samples (b, 1) of the noised Gaussian at t, float64."""
    d = draws(len(t), *name)
    x0 = MEAN + STD * d.normal(1, dtype=F64)
    return process.alpha(t)[:, None] * x0 + process.sigma(t)[:, None] * d.normal(1, dtype=F64)


class Batch64(Batch):
    """A micro-batch in float64."""

    @classmethod
    def of(cls, count: int, dim: int = 1, *name: int | str) -> Batch64:
        d = draws(count, "batch", *name)
        return cls(d, (dim,), MEAN + STD * d.normal(dim, dtype=F64))

    def noise(self) -> Tensor:
        return self.draws.normal(*self.shape, dtype=F64)
