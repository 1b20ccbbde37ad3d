"""BOOT: data-free distillation with bootstrapping (arXiv 2306.05544)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.process import bc
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import TimesPart, Uniform
from fewstep.config import part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles
from fewstep.objectives import mse
from fewstep.objectives.legs import Teacher


@part("method", "boot")
class BOOT:
    """From noise eps the student says y_t with x_t = alpha_t y_t + sigma_t eps, each t from the one above it."""

    cites: ClassVar[tuple[str, ...]] = ("2306.05544",)

    times: TimesPart = Uniform(low=0.0, high=1.0)
    """The upper time t of a pair."""
    step: float = 0.04
    """Distance in level between t and the time below it (paper: about 1/25 to 1/10)."""
    boundary_weight: float = 0.5
    """Weight of y at t_max, which must be the teacher's denoiser; errors run down from there."""
    guidance: float = 1.0
    """The teacher's guidance scale; 1 is none."""
    divide: bool = False
    """True: divide the loss by the step squared, the paper's scale."""

    def __post_init__(self) -> None:
        if not 0 < self.step < 1:
            raise ValueError(f"step must lie in (0, 1), not {self.step}")

    def needs(self) -> Needs:
        return Needs(frozenset({"teacher", "student"}), inputs=frozenset({"s"}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch))

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        student, process = roles.student, roles.student.process
        eps = batch.noise()
        unit: Any = _Level()
        u = self.step + (1 - self.step) * self.times.sample(batch.draws, unit)
        t, s = process.grid(u), process.grid(u - self.step)
        top = process.grid(torch.ones_like(t))
        start = process.prior(eps, top)
        teacher = Teacher(roles.teacher, batch, self.guidance)
        with torch.no_grad():
            y = student(start, top, batch.cond, s=t).x0
            target = self.advance(process, teacher, y, eps, t, s)
            first = teacher(start, top).x0
        weight = self.step**-2 if self.divide else 1.0
        own = student(start, top, batch.cond, s=s).x0
        boundary = student(start, top, batch.cond, s=top).x0
        yield Losses(
            {
                "bootstrap": weight * mse(own, target),
                "boundary": self.boundary_weight * mse(boundary, first),
            }
        )

    @staticmethod
    def advance(process, teacher, y: Tensor, eps: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """y_s = k y_t + (1 - k) D(x_t, t), k = alpha_t sigma_s / (sigma_t alpha_s) (the signal ODE by DDIM)."""
        x = bc(process.alpha(t), y) * y + bc(process.sigma(t), y) * eps
        k = bc(process.alpha(t) * process.sigma(s) / (process.sigma(t) * process.alpha(s)), y)
        return k * y + (1 - k) * teacher(x.to(y.dtype), t).x0

    def sampler(self) -> Sampler:
        return Sampler(kind="map", steps=(1.0,))


class _Level:
    """Times drawn as levels, before the process's grid."""

    @staticmethod
    def grid(u: Tensor) -> Tensor:
        return u
