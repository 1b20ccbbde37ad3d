"""MDT-dist: velocity matching and velocity distillation of marginal-data transport (arXiv 2509.04406)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import bc
from fewstep.algebra.sampling import Sampler, any_steps
from fewstep.algebra.times import LogitNormal, TimesPart, check_steps
from fewstep.config import part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Teacher


@part("method", "mdt")
class MDT:
    """The velocity to the clean end obeys v = v_T - t dv/dt (MeanFlow at s = 0), by a backward difference."""

    cites: ClassVar[tuple[str, ...]] = ("2509.04406",)

    times: TimesPart = LogitNormal(mean=1.0, std=1.0)
    """t, mapped into [step, 1]."""
    step: float = 0.01
    """Delta of the backward difference along the teacher's velocity."""
    slope_norm: float | None = 0.1
    """c of the normalisation dv/dt / (|dv/dt| + c) of the official code; left out: the exact target."""
    guidance: float = 1.0
    """Teacher's scale in velocity matching, w = 1 is none (official 41)."""
    distill_weight: float = 1.0
    """Weight of velocity distillation, the score difference without a critic; 0 for matching alone."""
    distill_guidance: float = 1.0
    """Teacher's scale there (official 101)."""
    steps: tuple[float, ...] = (1.0,)
    """Levels u that the student is sampled at; other numbers of steps are allowed too."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not 0 < self.step < 1:
            raise ValueError(f"step must lie in (0, 1), not {self.step}")

    def needs(self) -> Needs:
        return Needs(frozenset({"teacher", "student"}), data=True, process="flow")

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch))

    def target(self, roles: Roles, batch: Batch, x: Tensor, t: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(v_student at (x, t) with a gradient, its target v_T - t dv/dt without)."""
        here = roles.student(x, t, batch.cond).velocity()
        with torch.no_grad():
            v = Teacher(roles.teacher, batch, scale)(x, t).velocity()
            before = roles.student((x - self.step * v).to(x.dtype), t - self.step, batch.cond).velocity()
            slope = (here - before) / self.step
            if self.slope_norm is not None:
                slope = slope / bc(slope.flatten(1).norm(dim=1) + self.slope_norm, slope)
            return here, v - bc(t, x) * slope

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        process, low = roles.student.process, self.step + 1e-4
        t = low + (1 - low) * self.times.sample(batch.draws, process)
        x, _ = add_noise(process, batch.data(), batch.noise(), t)
        here, target = self.target(roles, batch, x, t, self.guidance)
        losses = Losses({"match": obj.mse(here, target)})
        if self.distill_weight:
            noise, one = batch.noise(), torch.ones_like(t)
            velocity = roles.student(noise, one, batch.cond).velocity()
            sample = (noise - velocity).detach()
            t = low + (1 - low) * self.times.sample(batch.draws, process)
            x, _ = add_noise(process, sample, batch.noise(), t)
            with torch.no_grad():
                here, target = self.target(roles, batch, x, t, self.distill_guidance)
            losses["distill"] = self.distill_weight * obj.surrogate_loss(velocity, 2 * (here - target))
        yield losses

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps, counts=any_steps(self.steps))
