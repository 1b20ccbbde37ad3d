"""Knowledge distillation: regress the student onto the end of the teacher's own trajectory (arXiv 2101.02388)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import Solver, ask, clean, times_of
from fewstep.algebra.sampling import Sampler, many_step
from fewstep.algebra.times import check_steps
from fewstep.config import Count, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.pairs import Pairs
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

    pairs: Count | None = None
    """Take noise and samples from a bank of so many, solved when the method starts and kept in the checkpoints (GET: a
    million); null: a fresh trajectory for every update."""
    correct: Annotated[float, Field(gt=0, le=1)] | None = None
    """Regress every answer of an iterative student, network get, the k-th before the last at this to the k-th power (GET:
    .8, with l1); null: the last alone."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.correct is not None and self.steps != (1.0,):
            raise ValueError(f"correct: is for a student that answers at the prior alone, not at the levels {self.steps}")
        if self.pairs is not None and len(self.steps) > 1:
            raise ValueError(f"pairs: hold no states between, which the levels {self.steps} need; leave it out")
        if self.correct is not None:  # GET's loss
            object.__setattr__(self, "cites", (*type(self).cites, "2401.08639"))

    def needs(self) -> Needs:
        roles = frozenset({"teacher", "student"} | perceptual(self.distance))
        frozen = frozenset({"teacher", "perceptual"})
        if self.pairs is None:
            return Needs(roles, frozen=frozen)
        count = self.pairs
        return Needs(roles, pairs=True, frozen=frozen, state=lambda data: Pairs(count, data))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        if self.pairs is not None:
            roles.state.fill(roles, many_step(self.teacher_steps, self.solver), self.guidance)
        yield Turn(("student",), lambda batch: self.losses(roles, batch))

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        process: Any = roles.student.process
        times = [t.expand(len(batch)) for t in times_of(self.steps, process).to(batch.draws.device)]
        end = clean(process, times[0])
        states, target, cond = self.trajectory(roles, batch, times)
        if self.correct is not None:
            yield self.corrected(roles, states[0], times[0], cond, target)
            return
        gaps = [
            apart(roles, ask(roles.student, x, t, end, cond).x0, target, self.distance)
            for x, t in zip(states, times, strict=True)
        ]
        yield Losses({"regress": torch.stack(gaps).mean()})

    def trajectory(self, roles: Roles, batch: Batch, times: list[Tensor]) -> tuple[list[Tensor], Tensor, Any]:
        """(the teacher's states at `times`, its sample, conditions), anew or from the bank."""
        process: Any = roles.student.process
        if self.pairs is not None:
            noise, target, cond = roles.state.draw(batch.draws)
            return [process.prior(noise, times[0])], target, cond
        walk = Teacher(roles.teacher, batch, self.guidance, self.solver).walk(self.teacher_steps)
        states = [process.prior(batch.noise(), times[0])]
        with torch.no_grad():
            for t, s in zip(times, [*times[1:], clean(process, times[0])], strict=True):
                states.append(walk(states[-1], t, s))
        return states[:-1], states[-1], batch.cond

    def corrected(self, roles: Roles, x: Tensor, t: Tensor, cond: Any, target: Tensor) -> Losses:
        """The weighted sum over the student's iterates (GET's code), and how much the first and the last one move."""
        taps = getattr(roles.student, "iterates", ())
        if not taps or self.correct is None:
            raise ValueError("method kd: correct needs a student with iterates, network get")
        seen = ask(roles.student, x, t, clean(roles.student.process, t), cond, taps=(*taps, "residual")).features
        weights = [self.correct ** (len(taps) - 1 - k) for k in range(len(taps))]
        gaps = [w * apart(roles, seen[tap], target, self.distance) for w, tap in zip(weights, taps, strict=True)]
        residual = seen["residual"]
        return Losses(
            {"regress": torch.stack(gaps).sum()}, {"residual_first": residual[0], "residual_last": residual[-1]}
        )

    def sampler(self) -> Sampler:
        # Re-noising the end gives the marginal at the next level, which is where its states came from.
        return Sampler(kind="renoise", steps=self.steps)
