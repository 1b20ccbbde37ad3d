"""FreeFlow: Flow Map Distillation Without Data (arXiv 2511.19428): the Lagrangian limit from the prior alone."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.condition import rows
from fewstep.algebra.guidance import guided
from fewstep.algebra.process import bc
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import LogitNormal, TimesPart, Uniform
from fewstep.config import part
from fewstep.methods.critic import Critic
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.terms import noised
from fewstep.networks.roles import Roles
from fewstep.objectives import trajectory as tr
from fewstep.objectives.legs import Teacher
from fewstep.objectives.reduce import global_mean


@part("method", "freeflow")
class FreeFlow:
    """Prediction: the jump from noise moves with the teacher's velocity at its end. Correction: a score difference."""

    cites: ClassVar[tuple[str, ...]] = ("2511.19428",)

    times: TimesPart = Uniform(low=1e-3, high=1.0)
    """End s of the jump from t = 1 (the paper's 1 - delta)."""
    power: float = 1.0
    """k of the adaptive weight of the prediction loss (ablation: k = 1)."""
    c: float = 1e-3
    """c of the adaptive weight 1 / (e + c)^k, for e a per-sample mean."""
    guidance: float = 1.0
    """The teacher's scale in the prediction; 1 is none."""
    tangent: tr.Tangent = "jvp"
    """Only along s, so it costs one cheap direction."""
    correction: float = 1.0
    """alpha: size of the correction relative to the prediction residual, in [.3, 3]; 0 trains no critic."""
    fraction: float = 0.25
    """Share of the batch given to the correction (paper .25). The prediction has all of it, in the paper the rest."""
    critic: Critic = Critic(times=Uniform(low=1e-3, high=1.0), weight="velocity")
    """It tracks the one-step samples by plain flow matching."""
    correction_times: TimesPart = LogitNormal(mean=0.8, std=1.0)
    """Noise level r of the correction, biased to high noise."""
    correction_guidance: float = 1.0
    """The teacher's scale in the correction; 1 is none."""
    correction_until: float = 0.7
    """Largest time r at which that scale holds (paper .7)."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction must lie in (0, 1), not {self.fraction}")
        if self.correction < 0:
            raise ValueError(f"correction must not be negative, not {self.correction}")
        if not 0 < self.correction_until <= 1:
            raise ValueError(f"correction_until must lie in (0, 1], not {self.correction_until}")

    def needs(self) -> Needs:
        roles = {"teacher", "student"} | ({"critic"} if self.correction else set())
        jvp, inputs = tr.forward_directions(self.tangent, "s"), frozenset({"s"})
        return Needs(frozenset(roles), jvp=jvp, process="flow", inputs=inputs)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch))
        if self.correction:
            yield self.critic.turn(roles, step, lambda batch: self.critic_losses(roles, batch))

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = batch.noise()
        s = self.times.sample(batch.draws, roles.student.process)
        residual, error = self.residual(roles, batch, x, s)
        losses = Losses({"predict": tr.adaptive(error, self.power, self.c)})
        if self.correction:
            sample, gradient = self.correct(roles, first(batch, max(1, int(len(batch) * self.fraction))))
            left, right = (global_mean(x.flatten(1).norm(dim=1)) for x in (residual, gradient))
            size = left / (right + 1e-6)
            losses["correct"] = obj.surrogate_loss(sample, self.correction * size * gradient)
        yield losses

    def residual(self, roles: Roles, batch: Batch, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The Lagrangian residual of the jump 1 -> s (b, *d) and raw minus its target, with a gradient."""
        process = roles.student.process
        t = torch.ones_like(s)
        here = tr.raw_of(roles.student, "velocity", batch.cond)
        raw = here(x, t, s)
        moved = tr.tangent(here, (x, t, s), (None, None, torch.ones_like(s)), self.tangent, floor=0 * s, ceiling=t)
        slope = tr.slopes(process, "velocity", t, s, "s")
        with torch.no_grad():
            end = bc(slope.a, x) * x + bc(slope.b, x) * raw
            v = Teacher(roles.teacher, batch, self.guidance)(end.to(x.dtype), s).velocity()
            residual = tr.lagrangian(slope, x, raw, moved, v)
        return residual, raw - tr.toward_raw(raw, residual)

    def correct(self, roles: Roles, batch: Batch) -> tuple[Tensor, Tensor]:
        """(x, u_fake - u_real): the one-step sample with a gradient, and the difference of noising velocities."""
        x = self.generate(roles, batch)
        with torch.no_grad():
            x_r, r = noised(self.correction_times, roles, batch, x)
            cond, null, until = batch.cond, batch.null_cond, self.correction_until
            interval = (0.0, until / (1 - until)) if until < 1 else None
            real = guided(roles.teacher, x_r, r, cond, null, self.correction_guidance, interval=interval)
            fake = roles.critic(x_r, r, batch.cond)
        # u = (x - D) / r toward the data, so u_fake - u_real of the paper is (D_fake - D_real) / r.
        return x, (fake.x0 - real.x0) / bc(r.clamp_min(1e-2), x)

    def generate(self, roles: Roles, batch: Batch) -> Tensor:
        """One-step samples (b, *d)."""
        x = batch.noise()
        one = torch.ones(len(batch), dtype=torch.float64, device=x.device)
        return roles.student(x, one, batch.cond, s=torch.zeros_like(one)).x0

    def critic_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        with torch.no_grad():
            x = self.generate(roles, batch)
        yield self.critic.losses(roles, batch, x)

    def sampler(self) -> Sampler:
        return Sampler(kind="map", steps=(1.0,))


def first(batch: Batch, count: int) -> Batch:
    """The first `count` rows as a batch; each draws next what it would draw in the whole batch."""
    draws = copy(batch.draws)
    draws.index = batch.draws.index[:count]
    x0, cond, null = (rows(part, slice(count)) for part in (batch.x0, batch.cond, batch.null_cond))
    return replace(batch, draws=draws, x0=x0, cond=cond, null_cond=null)
