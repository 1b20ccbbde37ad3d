"""Knowledge distillation: regress the student onto the end of the teacher's own trajectory (arXiv 2101.02388)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import Solver, ask, clean, times_of
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import check_steps
from fewstep.config import Count, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.terms import Apart, apart, perceptual
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Teacher


@part("method", "kd")
class KD:
    """Both legs are the teacher: from noise through the states at `steps` to the sample, all regressed onto it."""

    cites: ClassVar[tuple[str, ...]] = ("2101.02388",)

    steps: tuple[float, ...] = (1.0,)
    """Levels u at which the student is trained and sampled; each sees the teacher's state there."""
    teacher_steps: Count = 16
    """Solver steps of the teacher from one level to the next."""
    solver: Solver = "heun"
    """Solver of the teacher's leg; heun takes two calls a step, the others one."""
    guidance: float = 1.0
    """Guidance scale of the teacher; 1 is none."""
    distance: Apart = "mse"
    """lpips needs a role `perceptual` of network lpips."""

    def __post_init__(self) -> None:
        check_steps(self.steps)

    def needs(self) -> Needs:
        roles = frozenset({"teacher", "student"} | perceptual(self.distance))
        return Needs(roles, frozen=frozenset({"teacher", "perceptual"}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch))

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        process: Any = roles.student.process
        times = [t.expand(len(batch)) for t in times_of(self.steps, process).to(batch.draws.device)]
        end = clean(process, times[0])
        walk = Teacher(roles.teacher, batch, self.guidance, self.solver).walk(self.teacher_steps)
        states = [process.prior(batch.noise(), times[0])]
        with torch.no_grad():
            for t, s in zip(times, [*times[1:], end], strict=True):
                states.append(walk(states[-1], t, s))
        gaps = [
            apart(roles, ask(roles.student, x, t, end, batch.cond).x0, states[-1], self.distance)
            for x, t in zip(states[:-1], times, strict=True)
        ]
        yield Losses({"regress": torch.stack(gaps).mean()})

    def sampler(self) -> Sampler:
        # Re-noising the end gives the marginal at the next level, which is where its states came from.
        return Sampler(kind="renoise", steps=self.steps)
