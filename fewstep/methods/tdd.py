"""TDD: Target-Driven Distillation (arXiv 2409.01347)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws
from fewstep.algebra.noising import add_noise
from fewstep.algebra.sampling import Sampler, any_steps
from fewstep.algebra.times import check_steps
from fewstep.config import Count, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.terms import dropped
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Teacher, student_leg
from fewstep.objectives.trajectory import Distance, distance, two_leg

TABLE = 1000


def target_set(knots: int = 250, counts: Sequence[int] = (4, 5, 6, 7, 8), table: int = TABLE) -> list[int]:
    """The merged indices of equidistant K-step schedules on a grid of `knots` knots, with 0, without the top."""
    step = table // knots
    grid = [step * (i + 1) - 1 for i in range(knots)]
    merged = {0}
    for count in counts:
        merged |= {grid[math.ceil(knots * j / count) - 1] for j in range(1, count)}
    return sorted(merged)


def level(index: Tensor) -> Tensor:
    """Level u of a table index: index 0 is the clean end, index i the knot (i + 1) / table."""
    return torch.where(index > 0, (index.double() + 1) / TABLE, torch.zeros_like(index, dtype=torch.float64))


@part("method", "tdd")
class TDD:
    """Consistency toward a set of target times taken from the few-step schedules that will be used."""

    cites: ClassVar[tuple[str, ...]] = ("2409.01347",)

    knots: Count = 250
    """Knots of the DDIM grid on a table of 1000."""
    counts: tuple[int, ...] = (4, 5, 6, 7, 8)
    """Numbers of steps whose schedules make the target set."""
    window: Count = 260
    """A target lies at most this many indices below the largest one that is allowed."""
    shrink: float = 0.3
    """s = (1 - U shrink) T: targets also between the members of the set (official s_ratio .3)."""
    guidance: float = 4.5
    """Teacher's scale, w = 1 is none (official 3.5 in the convention w - 1)."""
    drop_cond: float = 0.2
    """Share of rows without condition and guidance, which lets guidance be tuned at sampling (sec. 3.3)."""
    distance: Distance = "huber"
    """How the two answers are compared: huber is LCM's, of every element; huber_sample iCT's, of a sample's norm."""
    c: float = 1e-3
    """c of the pseudo-Huber distances, in units of the data (which lies in [-1, 1]); mse and l1 have none."""
    steps: tuple[float, ...] = (1.0, 0.752, 0.5, 0.252)
    """Levels; these are indices 999, 751, 499 and 251, members of the target set."""
    eta: float = 0.3
    """Stochasticity of the TCD sampler."""
    clip: float | None = None
    """Quantile of x0 clipping at sampling; left out: none."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.clip is not None and not 0 < self.clip <= 1:
            raise ValueError(f"clip must be a quantile in (0, 1], not {self.clip}")
        if TABLE % self.knots:
            raise ValueError(f"knots must divide {TABLE}, not {self.knots}")
        if not 0 <= self.shrink <= 1:
            raise ValueError(f"shrink must lie in [0, 1], not {self.shrink}")

    def needs(self) -> Needs:
        return Needs(frozenset({"teacher", "student"}), data=True)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch))

    def indices(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """(t, t_n, s) as table indices int64 (b,), s <= T <= t_n < t."""
        width = TABLE // self.knots
        t = width * (draws.integers(self.knots) + 1) - 1
        t_n = (t - width).clamp_min(0)
        members = torch.tensor(target_set(self.knots, self.counts), device=t.device)
        high = torch.searchsorted(members, t_n, right=True) - 1
        low = torch.searchsorted(members, members[high] - self.window)
        pick = low + ((high - low + 1) * draws.uniform()).long().clamp_max(high - low)
        s = ((1 - draws.uniform() * self.shrink) * members[pick]).floor().long()
        return t, t_n, s

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        student, process = roles.student, roles.student.process
        t, u, s = (process.grid(level(i)) for i in self.indices(batch.draws))
        x, _ = add_noise(process, batch.data(), batch.noise(), t)
        cond = dropped(batch, self.drop_cond)
        seen = replace(batch, cond=cond)
        scale = self.guidance if batch.cond is not None else 1.0
        own = student_leg(student, cond)
        target = two_leg(Teacher(roles.teacher, seen, scale).step, own, x, t, u, s)
        yield Losses({"consistency": distance(own(x, t, s), target, self.distance, self.c)})

    def sampler(self) -> Sampler:
        kind: Any = "gamma" if self.eta else "map"
        return Sampler(
            kind=kind,
            steps=self.steps,
            eta=self.eta,
            clip=self.clip,
            counts=any_steps(self.steps, self.counts),
            knots=self.knots,
        )
