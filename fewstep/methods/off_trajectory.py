"""CDM: matching off the student's trajectory too, so that it holds at levels it does not visit (arXiv 2605.06376)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import ask, clean
from fewstep.algebra.prediction import from_x0
from fewstep.algebra.rollout import Rollout
from fewstep.algebra.times import TimesPart, Uniform, law_at
from fewstep.config import NotNegative, config
from fewstep.networks.roles import Roles


@config
class OffTrajectory:
    """A second point of each update, reached from the first along the student's own velocity, and matched like it."""

    cites: ClassVar[tuple[str, ...]] = ("2605.06376",)

    weight: NotNegative = 1.0
    """Weight of its loss beside that on the trajectory (official code: 1); 0 is none."""
    times: TimesPart = Uniform(low=0.0, high=1.0)
    """Law of its level, on either side of the trajectory's (official code: uniform)."""
    floor: NotNegative = 0.1
    """Least <|x - D_real|> that divides its gradient (official code: 0.1)."""
    warmup: Annotated[int, Ge(0)] = 0
    """Updates over which the weight grows from 0."""

    def scale(self, step: int) -> float:
        """The weight at an update."""
        return self.weight * min(1.0, (step + 1) / (self.warmup + 1))

    def sample(self, roles: Roles, batch: Batch, made: Rollout) -> Tensor:
        """The student's x0 (b, *d) at x_s = x_t + (s - t) v for a rollout's last input x_t and its velocity v.

        That is the DDIM transfer of its answer to a fresh level s, in any process. The gradient is of the new call alone.
        """
        process: Any = roles.student.process
        s = law_at(self.times, batch.step).sample(batch.draws, process)
        with torch.no_grad():
            x = from_x0(process, made.x_in, made.t, made.x.detach()).at(s)
        return ask(roles.student, x, s, clean(process, s), batch.cond).x0
