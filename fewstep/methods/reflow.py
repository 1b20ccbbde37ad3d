"""Reflow (arXiv 2209.03003) and SlimFlow's annealing reflow and flow-guided distillation (arXiv 2407.12718)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import Solver
from fewstep.algebra.process import bc
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import TimesPart, Uniform, check_steps
from fewstep.config import Count, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles
from fewstep.objectives import mse
from fewstep.objectives.legs import Teacher


@part("method", "reflow")
class Reflow:
    """Flow matching on the teacher's own (noise, sample) pairs straightens the flow; then one step is distilled."""

    cites: ClassVar[tuple[str, ...]] = ("2209.03003", "2407.12718")

    mode: Literal["reflow", "distill"] = "reflow"
    """reflow: a velocity at all t; distill: only the one-step end point (SlimFlow's second stage)."""
    times: TimesPart = Uniform(low=0.0, high=1.0)
    """Distribution of t on the straight line of a pair."""
    teacher_steps: Count = 16
    """Solver steps that make a pair."""
    solver: Solver = "heun"
    """Solver of the pairs; heun takes two teacher calls a step, the others one."""
    guidance: float = 1.0
    """The teacher's guidance scale; 1 is none."""
    anneal: int = 0
    """Updates over which beta falls from 1 to 0 (annealing reflow, 300k in SlimFlow); 0 is plain reflow."""
    guide_weight: float = 0.0
    """distill: weight of flow-guided distillation, one step of `guide` from the student's own straight line; SlimFlow
    has 1, 0 is plain distillation."""
    guide: Literal["teacher", "straight"] = "straight"
    """Whose step that is: that of the role `straight`, a frozen copy of the reflowed student (the paper's), or the
    teacher's, a curved flow that never passes through points of a straight line and draws samples together."""
    guide_span: tuple[float, float] = (0.2, 0.8)
    """Times (noise at 1) at which that teacher step starts."""
    steps: tuple[float, ...] = (1.0,)
    """Levels u that the student is sampled at."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.anneal < 0 or not 0 <= self.guide_span[0] < self.guide_span[1] <= 1:
            raise ValueError("need anneal >= 0 and 0 <= guide_span low < high <= 1")

    def needs(self) -> Needs:
        own = {"straight"} if self.guide_weight and self.guide == "straight" else set()
        return Needs(frozenset({"teacher", "student", *own}), process="flow", frozen=frozenset({"teacher", *own}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch, step))

    def beta(self, step: int) -> float:
        """Share of fresh noise in z_beta = sqrt(1 - beta^2) z + beta xi, linear to 0."""
        return max(0.0, 1 - step / self.anneal) if self.anneal else 0.0

    def losses(self, roles: Roles, batch: Batch, step: int) -> Iterator[Losses]:
        student, z = roles.student, batch.noise()
        one = torch.ones(len(batch), dtype=torch.float64, device=z.device)
        teacher = Teacher(roles.teacher, batch, self.guidance, self.solver)
        with torch.no_grad():
            x0 = teacher.walk(self.teacher_steps)(z, one, 0 * one).to(z.dtype)
        if self.mode == "distill":
            velocity = student(z, one, batch.cond).velocity()
            losses = Losses({"distill": mse(z - velocity, x0)})
            if self.guide_weight:
                low, high = self.guide_span
                t = low + (high - low) * batch.draws.uniform()
                with torch.no_grad():
                    on_line = z - bc(1 - t, z) * velocity
                    ahead = Teacher(roles["straight"], batch) if self.guide == "straight" else teacher
                    end = ahead(on_line.to(z.dtype), t).x0
                losses["guide"] = self.guide_weight * mse(z - velocity, end)
            yield losses
            return
        z = interpolate(z, batch.noise(), self.beta(step))
        t = self.times.sample(batch.draws, student.process)
        x = bc(1 - t, z) * x0 + bc(t, z) * z
        yield Losses({"reflow": mse(student(x, t, batch.cond).velocity(), z - x0)})

    def sampler(self) -> Sampler:
        return Sampler(kind="map", steps=self.steps)


def interpolate(z: Tensor, fresh: Tensor, beta: float) -> Tensor:
    """sqrt(1 - beta^2) z + beta fresh: unit variance at every beta."""
    return (1 - beta**2) ** 0.5 * z + beta * fresh
