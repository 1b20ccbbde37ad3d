"""Progressive Distillation for Fast Sampling of Diffusion Models (arXiv 2202.00512)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import Process
from fewstep.algebra.sampling import Sampler
from fewstep.config import Count, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles
from fewstep.objectives import mse
from fewstep.objectives.legs import Teacher
from fewstep.objectives.regression import Weight, x0_weight
from fewstep.objectives.trajectory import chord_x0


@part("method", "progressive")
class Progressive:
    """One DDIM step of the student equals two of the stage before; stages of a recipe halve `steps`."""

    cites: ClassVar[tuple[str, ...]] = ("2202.00512", "2210.03142")

    steps: Count = 1
    """DDIM steps of the student; its teacher takes twice as many."""
    of: Literal["teacher", "previous"] = "previous"
    """Who is halved: the frozen role `previous`, to which a stage copies the student, or the teacher itself.

    A stage with `copy: {teacher: student}` puts the student in the teacher's place, without a third network.
    """
    weight: Weight = "snr_truncated"
    """Weight of the x0 error: snr_truncated max(SNR, 1), v SNR + 1, eps SNR, x0 1 (sec. 4)."""
    guidance: float = 1.0
    """Guidance scale of the role that is halved; only a first stage from the teacher uses it."""

    def needs(self) -> Needs:
        return Needs(frozenset({self.of, "student"}), data=True, frozen=frozenset({"teacher", "previous"}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch))

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        process: Any = roles.student.process
        t, mid, s = self.times(batch, process)
        x, _ = add_noise(process, batch.data(), batch.noise(), t)
        with torch.no_grad():
            target = self.target(Teacher(roles[self.of], batch, self.guidance), process, x, t, mid, s)
        x0 = roles.student(x, t, batch.cond).x0
        # At t = t_max a flow has SNR 0: "v" and "x0" weights stay finite where sigma > 0.
        yield Losses({"regress": mse(x0, target, x0_weight(self.weight, process, t))})

    def times(self, batch: Batch, process: Process) -> tuple[Tensor, Tensor, Tensor]:
        """t = (i + 1) / N, half a step and a whole step below it, on the process's grid; i uniform."""
        u = (batch.draws.integers(self.steps) + 1).double() / self.steps
        return process.grid(u), process.grid(u - 0.5 / self.steps), process.grid(u - 1 / self.steps)

    @staticmethod
    def target(teacher: Teacher, process: Process, x: Tensor, t: Tensor, mid: Tensor, s: Tensor) -> Tensor:
        """The x0 whose one DDIM step does what two of the teacher's do."""
        return chord_x0(process, x, t, teacher.step(teacher.step(x, t, mid), mid, s), s)

    def sampler(self) -> Sampler:
        levels = tuple(1 - i / self.steps for i in range(self.steps))
        return Sampler(kind="map", steps=levels)
