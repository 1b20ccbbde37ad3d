"""Self-E: a network from scratch that judges its own jumps with its own score (arXiv 2512.22374)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import Process, bc
from fewstep.algebra.sampling import Sampler, any_steps
from fewstep.algebra.times import LogitNormal, TimesPart, check_steps
from fewstep.config import Decay, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.terms import dropped
from fewstep.networks.roles import Roles
from fewstep.objectives import mse
from fewstep.objectives.legs import between
from fewstep.objectives.trajectory import follow


@part("method", "self_e")
class SelfE:
    """Flow matching on data, and jumps t -> s moved along the network's own D(c) - D(no c) where they land."""

    cites: ClassVar[tuple[str, ...]] = ("2512.22374",)

    times: TimesPart = LogitNormal()
    """Distribution of t (the paper's shift grows with the sequence length)."""
    local: float = 0.5
    """Share of the batch with s = t: flow matching alone."""
    ramp: int = 1000
    """Updates over which s may reach down from t to 0 (paper: 300,000)."""
    target_decay: Decay = 0.999
    """Decay of the EMA student in the role `target`, which gives D(c) (paper: .9999)."""
    drop_cond: float = 0.1
    """Share of rows trained without their condition, which D(no c) needs."""
    strength: float = 1.0
    """Factor of lambda; 0 leaves regression on the pair."""
    steps: tuple[float, ...] = (1.0,)
    """Levels u that the student is sampled at; other numbers of steps are allowed too."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not 0 <= self.local <= 1 or self.ramp < 1 or not 0 <= self.drop_cond < 1:
            got = f"{self.local}, {self.ramp}, {self.drop_cond}"
            raise ValueError(f"need local in [0, 1], ramp >= 1 and drop_cond in [0, 1), not {got}")

    def needs(self) -> Needs:
        return Needs(
            frozenset({"student", "target"}),
            data=True,
            process="flow",
            inputs=frozenset({"s"}),
            conditions=frozenset({"classes", "text"}),  # it judges by its condition
            frozen=frozenset({"teacher", "target"}),
        )

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch, step))
        follow(roles.target, roles.student, self.target_decay)

    def pair(self, batch: Batch, process: Process, step: int) -> tuple[Tensor, Tensor]:
        """(t, s): s = t for the share `local`, else uniform in [(1 - tau) t, t] with tau growing to 1."""
        t = self.times.sample(batch.draws, process).clamp(1e-3, 1 - 1e-3)
        share = min(1.0, step / self.ramp)
        s = between(batch.draws, (1 - share) * t, t)
        return t, torch.where(batch.draws.uniform() < self.local, t, s)

    def losses(self, roles: Roles, batch: Batch, step: int) -> Iterator[Losses]:
        student, process = roles.student, roles.student.process
        t, s = self.pair(batch, process, step)
        x0, cond = batch.data(), dropped(batch, self.drop_cond)
        x, _ = add_noise(process, x0, batch.noise(), t)
        here = student(x, t, cond, s=s).x0
        target = self.target(roles, batch, here.detach(), t, s, cond)
        # In the flow process x0 = x - t v: the weight 1 / t^2 makes the x0 error one of the velocity.
        yield Losses({"self_e": mse(here, target, 1 / t**2)})

    @torch.no_grad()
    def target(self, roles: Roles, batch: Batch, own: Tensor, t: Tensor, s: Tensor, cond: object) -> Tensor:
        """The pair's x0 plus lambda times own - (D(no c) - D(c)) at x_s, scaled back to the length of x0; (b, *d)."""
        x0, process = batch.data(), roles.student.process
        if not self.strength:
            return x0
        landed, _ = add_noise(process, own, batch.noise(), s)
        gap = roles.student(landed, s, batch.null_cond, s=s).x0 - roles.target(landed, s, cond, s=s).x0
        moved = x0 + bc(self.strength * reach(process, t, s), x0) * (own - gap)
        size = x0.flatten(1).norm(dim=1) / moved.flatten(1).norm(dim=1).clamp_min(1e-12)
        return (moved * bc(size, x0)).to(x0.dtype)

    def sampler(self) -> Sampler:
        return Sampler(kind="map", steps=self.steps, counts=any_steps(self.steps))


def reach(process: Process, t: Tensor, s: Tensor) -> Tensor:
    """lambda = sigma_t / alpha_t - sigma_s / alpha_s (b,), zero at s = t (paper, sec. 3.3)."""
    return process.sigma(t) / process.alpha(t) - process.sigma(s) / process.alpha(s)
