"""TCM: Truncated Consistency Models (arXiv 2410.14895)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import ask, clean
from fewstep.algebra.pairings import ECTPairs
from fewstep.algebra.process import add_noise, bc
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import Uniform, check_steps
from fewstep.config import choice, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles
from fewstep.objectives.trajectory import Distance, distance


@part("method", "tcm")
class TCM:
    """A second stage that trains a consistency model at t >= t' only; the first stage stays frozen below."""

    cites: ClassVar[tuple[str, ...]] = ("2410.14895",)

    boundary: float = 0.4
    """Level u of t' (sigma 1.0 on CIFAR is u = .47 of the Karras grid)."""
    pairing: choice("pairing") = ECTPairs(times=Uniform(low=0.0, high=1.0))  # type: ignore[valid-type]
    """Times of the consistency part; those below t' are moved to the boundary part (paper: ect with log_student_t)."""
    boundary_fraction: float = 0.25
    """Share of the batch that stands exactly at t' (official: .25)."""
    boundary_weight: float = 0.1
    """Weight of the boundary loss (official: .1)."""
    distance: Distance = "huber_sample"
    c: float = 1e-8
    steps: tuple[float, ...] = (1.0,)
    """Sampling levels; none may lie below the boundary."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not 0 < self.boundary < 1:
            raise ValueError(f"boundary must lie in (0, 1), not {self.boundary}")
        if self.steps[-1] < self.boundary:
            raise ValueError(
                f"steps {list(self.steps)} go below the boundary {self.boundary}, untrained there"
            )

    def needs(self) -> Needs:
        roles = frozenset({"student", "stage1"})
        return Needs(roles, data=True, frozen=frozenset({"teacher", "stage1"}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch, step))

    def losses(self, roles: Roles, batch: Batch, step: int) -> Iterator[Losses]:
        process: Any = roles.student.process
        t, u = self.pairing.sample(batch.draws, process, step)
        edge = process.grid(torch.full_like(t, self.boundary))
        at_edge = (batch.draws.uniform() < self.boundary_fraction) | (t <= edge)
        t = torch.where(at_edge, edge, t)
        u = torch.where(at_edge, edge, u)
        x0, eps = batch.data(), batch.noise()
        x_t, x_u = (add_noise(process, x0, eps, time)[0] for time in (t, u))
        end = clean(process, t)
        with torch.no_grad():
            old = ask(roles.stage1, x_u, u, end, batch.cond).x0
            own = ask(roles.student, x_u, u, end, batch.cond).x0
            target = torch.where(bc(u, old) <= bc(edge, old), old, own)
        here = ask(roles.student, x_t, t, end, batch.cond).x0
        gap = 1 / (t - u).clamp_min(1e-6)
        inner = distance(here, target, self.distance, self.c, torch.where(at_edge, 0 * gap, gap))
        boundary = distance(here, target, "mse", 0.0, at_edge.to(gap.dtype))
        yield Losses({"consistency": inner, "boundary": self.boundary_weight * boundary})

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps)
