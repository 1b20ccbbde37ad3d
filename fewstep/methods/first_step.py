"""DP-DMD: the first step regresses the teacher's state, the others match distributions (arXiv 2602.03139)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws
from fewstep.algebra.jump import Solver, ask, clean, times_of
from fewstep.algebra.rollout import exit_step
from fewstep.config import Count, NotNegative, config
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Teacher
from fewstep.objectives.trajectory import chord_x0


@config
class FirstStep:
    """The first of several steps apart from the others: from each noise towards where the teacher goes from it.

    Matching alone lets many noises share a sample; a first step that keeps to the teacher's path does not.
    """

    cites: ClassVar[tuple[str, ...]] = ("2602.03139",)

    weight: NotNegative = 0.05
    """Weight of the regression (the paper's lambda: 0.05). 0 is none, and the first step is matched like the others."""
    level: float = 5 / 6
    """Level u of the teacher's state, below the first step's: the paper's is where 5 of 30 even steps end. Too near the
    first level it says little, too far down it asks for details that one step cannot make."""
    teacher_steps: Count = 5
    """Solver steps of the teacher from the first level to `level`, at the scale of its score difference."""
    solver: Solver = "ddim"
    """Solver of the teacher; heun takes two calls a step."""

    def __post_init__(self) -> None:
        if not 0 <= self.level < 1:
            raise ValueError(f"level must lie in [0, 1), below the first step, not {self.level}")

    def check(self, steps: tuple[float, ...]) -> None:
        """ValueError for a student's levels that leave no step to match, or none for the teacher."""
        if len(steps) < 2:
            raise ValueError(f"first_step: steps {list(steps)} have no second one to match; give two or more, or null")
        if self.level >= steps[0]:
            raise ValueError(f"first_step.level: {self.level} must lie below the first step {steps[0]}")

    def exit(self, draws: Draws, count: int) -> int:
        """The step of `count` at which a rollout stops: never the first."""
        return 1 + exit_step(draws, count - 1)

    def loss(self, roles: Roles, batch: Batch, first: float, guidance: float) -> Tensor:
        """The weighted error of the student's x0 at the level `first`, a scalar.

        Its target is the x0 whose chord from the noise ends in the teacher's state z. In a flow from t = 1 the error is
        the paper's |v - (e - z) / (1 - t_K)|^2, v being e - x0 there; EDM's velocity would vanish at sigma_max.
        """
        process: Any = roles.student.process
        b = len(batch)
        t, s = (u.expand(b) for u in times_of((first, self.level), process).to(batch.draws.device))
        x = process.prior(batch.noise(), t)
        with torch.no_grad():
            z = Teacher(roles.teacher, batch, guidance, self.solver).walk(self.teacher_steps)(x, t, s)
        target = chord_x0(process, x, t, z, s)
        return self.weight * obj.mse(ask(roles.student, x, t, clean(process, t), batch.cond).x0, target)
