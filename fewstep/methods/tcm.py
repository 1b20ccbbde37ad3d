"""TCM: Truncated Consistency Models (arXiv 2410.14895)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import ask, clean, clean_of
from fewstep.algebra.noising import add_noise
from fewstep.algebra.pairings import ECTPairs
from fewstep.algebra.process import bc
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import LogStudentT, check_steps
from fewstep.config import part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles
from fewstep.objectives.reduce import global_mean
from fewstep.objectives.trajectory import Distance, distance


@part("method", "tcm")
class TCM:
    """A second stage that trains a consistency model at t >= t' only; the first stage stays frozen below."""

    cites: ClassVar[tuple[str, ...]] = ("2410.14895",)

    boundary: float = 0.4034
    """Level u of t' (CIFAR-10: sigma 1, which is .4034 of the Karras grid; in flow it is .5)."""
    pairing: ECTPairs = ECTPairs(first=9, times=LogStudentT())
    """Times, and how near their neighbours are: the second stage starts at the limit .999, where the first one ended.
    Rows drawn below t' are moved to it."""
    boundary_fraction: float = 0.25
    """Share of the batch that stands exactly at t' (official: .25)."""
    boundary_weight: float = 0.1
    """Weight of the mean loss of those rows, beside the mean loss of the others (official: .1)."""
    distance: Distance = "huber_sample"
    """How the two answers are compared: huber is LCM's, of every element; huber_sample iCT's, of a sample's norm."""
    c: float = 1e-8
    """c of the pseudo-Huber distances, in units of the data (which lies in [-1, 1]); mse and l1 have none."""
    steps: tuple[float, ...] = (1.0,)
    """Sampling levels; none may lie below the boundary."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not 0 < self.boundary < 1:
            raise ValueError(f"boundary must lie in (0, 1), not {self.boundary}")
        if self.steps[-1] < self.boundary:
            raise ValueError(f"steps {list(self.steps)} go below the boundary {self.boundary}, untrained there")

    def needs(self) -> Needs:
        roles = frozenset({"student", "stage1"})
        return Needs(roles, data=True, frozen=frozenset({"teacher", "stage1"}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch, step))

    def losses(self, roles: Roles, batch: Batch, step: int) -> Iterator[Losses]:
        """Rows at t' have the same loss as all others; their neighbour lies below it, in the first stage."""
        process: Any = roles.student.process
        t, u = self.pairing.sample(batch.draws, process, step)
        edge = process.grid(torch.full_like(t, self.boundary))
        at_edge = (batch.draws.uniform() < self.boundary_fraction) | (t <= edge)
        t = torch.where(at_edge, edge, t)
        u = torch.where(at_edge, self.pairing.lower(process, edge, step), u)
        x0, eps = batch.data(), batch.noise()
        x_t, x_u = (add_noise(process, x0, eps, time)[0] for time in (t, u))
        with torch.no_grad():
            old, own = (clean_of(net, x_u, u, batch.cond) for net in (roles.stage1, roles.student))
            target = torch.where(bc(u, old) <= bc(edge, old), old, own)
        here = ask(roles.student, x_t, t, clean(process, t), batch.cond).x0
        losses = Losses()
        for name, weight, mine in (
            ("consistency", 1.0, ~at_edge),
            ("boundary", self.boundary_weight, at_edge),
        ):
            # Each part is the mean over its own rows, of all processes.
            share = mine / global_mean(mine.double()).clamp_min(1e-12)
            gap = share / (t - u).clamp_min(1e-6)
            losses[name] = weight * distance(here, target, self.distance, self.c, gap)
        yield losses

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps)
