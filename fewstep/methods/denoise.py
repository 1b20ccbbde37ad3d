"""Denoising: train the student as a denoiser, on data or onto the teacher. Makes teachers and warm starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch

from fewstep.algebra.batch import Batch
from fewstep.algebra.noising import add_noise
from fewstep.algebra.sampling import Sampler, many_step
from fewstep.algebra.times import LogNormal, TimesPart
from fewstep.algebra.views import ViewPart, Whole
from fewstep.config import part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.terms import dropped
from fewstep.networks.roles import Roles
from fewstep.objectives import dsm, mse
from fewstep.objectives.regression import Weight, x0_weight


@part("method", "denoise")
class Denoise:
    """Denoising score matching of the student (arXiv 2206.00364, eq. 2), with condition dropout."""

    cites: ClassVar[tuple[str, ...]] = ("2206.00364",)

    times: TimesPart = LogNormal()
    """Noise levels; EDM trains on ln sigma ~ N(-1.2, 1.2^2) (table 1)."""
    weight: Weight = "edm"
    """Weight of the x0 error; "edm" for EDM (table 1)."""
    target: Literal["data", "teacher"] = "data"
    """data: regress on clean data; teacher: on the teacher's denoiser at the same noised data."""
    of: str = "teacher"
    """Role that plays the teacher."""
    role: str = "student"
    """Role that is trained; another than the student where a later stage learns from it."""
    drop_cond: float = 0.1
    """Probability of training a sample without its condition, which guidance needs (arXiv 2207.12598)."""
    view: ViewPart = Whole()
    """What of the data is learned: `negative` makes an adapter that draws with inverted contrast."""
    sample_steps: int = 18
    """Steps of the Heun sampler that shows its progress."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_cond <= 1:
            raise ValueError(f"drop_cond must lie in [0, 1], not {self.drop_cond}")
        if self.role in ("teacher", self.of):
            raise ValueError(f"role {self.role}: cannot be trained where it is the teacher")
        if self.sample_steps < 1:
            raise ValueError(f"sample_steps must be at least 1, not {self.sample_steps}")

    def needs(self) -> Needs:
        roles = {self.role, self.of} if self.target == "teacher" else {self.role}
        return Needs(frozenset(roles), data=True, frozen=frozenset({"teacher", self.of}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn((self.role,), lambda batch: self.losses(roles, batch))

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        student, x0 = roles[self.role], self.view.see(batch.data(), batch.draws)
        process: Any = student.process
        t, eps = self.times.sample(batch.draws, process), batch.noise()
        cond = dropped(batch, self.drop_cond)
        if self.target == "data":
            yield Losses({"dsm": dsm(student, x0, t, eps, cond, weight=self.weight)})
            return
        x_t, _ = add_noise(process, x0, eps, t)
        with torch.no_grad():
            target = roles[self.of](x_t, t, cond).x0
        error = mse(student(x_t, t, cond).x0, target, x0_weight(self.weight, process, t))
        yield Losses({"regress": error})

    def sampler(self) -> Sampler:
        return many_step(self.sample_steps)
