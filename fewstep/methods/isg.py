"""ISG: the teacher shows the way into each of the student's segments (SenseFlow, arXiv 2506.00523)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import ask, clean
from fewstep.algebra.prediction import from_x0
from fewstep.algebra.rollout import Path, exit_step, rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import check_steps
from fewstep.config import part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.terms import Apart, apart, perceptual
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Scale, Teacher, check_scale, drawn


@part("method", "isg")
class ISG:
    """The student's jump to its next level lands where one teacher step and its own jump from there do.

    It matches no distribution: `joint` adds it to a method that does, with a weight.
    """

    cites: ClassVar[tuple[str, ...]] = ("2506.00523",)

    steps: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    """Levels u the student is sampled at, as those of the method beside it; the last segment ends at clean samples."""
    guidance: Scale = 1.0
    """Guidance scale of the teacher's step, a number or a range to draw from: the official code has U(2, 4) for SD3.5
    Medium, U(1, 8) for FLUX and U(3, 15) for SDXL."""
    margin: Annotated[float, Ge(0), Lt(0.5)] = 0.2
    """Share of a segment that the level between keeps off each end (official code: 50 of 250 steps)."""
    distance: Apart = "huber"
    """huber with c = 0.001 in the official code; lpips needs a role `perceptual` of network lpips."""
    path: Path = "renoise"
    """How the student gets to its segments, that of the method beside it."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_scale(self.guidance)

    def needs(self) -> Needs:
        roles = frozenset({"teacher", "student"} | perceptual(self.distance))
        return Needs(roles, frozen=frozenset({"teacher", "perceptual"}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch))

    def sampler(self) -> Sampler:
        return Sampler(kind=self.path, steps=self.steps)

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        """The distance of the two landings at the end of one segment, drawn for the update."""
        process: Any = roles.student.process
        i = exit_step(batch.draws, len(self.steps))
        made = rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond, exit=i, path=self.path)
        low = self.steps[i + 1] if i + 1 < len(self.steps) else 0.0
        share = self.margin + (1 - 2 * self.margin) * batch.draws.uniform()
        middle = process.grid(low + (self.steps[i] - low) * share)
        end = process.grid(torch.full_like(middle, low))
        with torch.no_grad():
            teacher = Teacher(roles.teacher, batch, drawn(self.guidance, batch.draws))
            x = teacher.step(made.x_in, made.t, middle)
            target = ask(roles.student, x, middle, clean(process, middle), batch.cond).at(end)
        landed = from_x0(process, made.x_in, made.t, made.x).at(end)
        yield Losses({"guide": apart(roles, landed, target, self.distance)})
