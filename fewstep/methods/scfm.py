"""SCFM: velocity self-distillation of a pre-trained flow without a step embedding (arXiv 2510.17858)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import bc
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import check_steps, shift
from fewstep.config import Count, Decay, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles
from fewstep.objectives import mse
from fewstep.objectives.legs import Teacher
from fewstep.objectives.trajectory import follow


@part("method", "scfm")
class SCFM:
    """The velocity at t equals that of two Euler steps below it, which straightens the field itself."""

    cites: ClassVar[tuple[str, ...]] = ("2510.17858",)

    nodes: Count = 32
    """Intervals of the time grid."""
    shift: tuple[float, float] = (2.5, 4.5)
    """Range of the grid's flow shift, one per sample (Flux)."""
    anchored: float = 0.4
    """Share of the batch on adjacent nodes of the teacher; the rest follows the EMA over longer skips."""
    target_decay: Decay = 0.999
    """Decay of the EMA student in the role `target`."""
    guidance: float = 1.0
    """The teacher's guidance scale; 1 is none."""
    steps: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    """Levels u that the student is sampled at, by Euler steps."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.nodes < 8 or not 0 <= self.anchored <= 1 or not 1 <= self.shift[0] <= self.shift[1]:
            raise ValueError("need nodes >= 8, anchored in [0, 1] and 1 <= shift low <= high")

    def needs(self) -> Needs:
        roles = frozenset({"teacher", "student", "target"})
        return Needs(roles, data=True, process="flow", frozen=frozenset({"teacher", "target"}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch))
        follow(roles.target, roles.student, self.target_decay)

    def nodes_of(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(anchored, t, middle, end): three nodes `skip` apart on a shifted grid; skip 1 where anchored."""
        draws = batch.draws
        anchored = draws.uniform() < self.anchored
        longest = max(1, (self.nodes // 4).bit_length() - 1)
        skip = torch.where(anchored, torch.ones(()), 2.0 ** (1 + draws.integers(longest)).double())
        skip = skip.clamp_max(self.nodes // 2)
        first = 2 * skip + ((self.nodes - 2 * skip + 1) * draws.uniform()).floor()
        factor = self.shift[0] + (self.shift[1] - self.shift[0]) * draws.uniform()
        t, middle, end = (shift((first - k * skip) / self.nodes, factor) for k in range(3))
        return anchored, t, middle, end

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        process = roles.student.process
        anchored, t, middle, end = self.nodes_of(batch)
        x, _ = add_noise(process, batch.data(), batch.noise(), t)
        teacher, mask = Teacher(roles.teacher, batch, self.guidance), bc(anchored.to(t.dtype), x) > 0

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return torch.where(mask, teacher(x, t).velocity(), roles.target(x, t, batch.cond).velocity())

        with torch.no_grad():
            first = velocity(x, t)
            d, e = bc(t - middle, x), bc(middle - end, x)
            target = (d * first + e * velocity((x - d * first).to(x.dtype), middle)) / (d + e)
        yield Losses({"straighten": mse(roles.student(x, t, batch.cond).velocity(), target)})

    def sampler(self) -> Sampler:
        return Sampler(kind="map", steps=self.steps)
