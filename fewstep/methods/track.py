"""Let the critic learn the score of a frozen student: warm-up of critics, DisBack's recording (arXiv 2408.15991)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from fewstep.algebra.batch import Batch
from fewstep.algebra.rollout import rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import Uniform, check_steps
from fewstep.config import choice, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.terms import track
from fewstep.networks.roles import Roles
from fewstep.objectives.regression import Weight


@part("method", "track")
class Track:
    """Denoising score matching of the critic on samples of a student that stays as it is.

    From the teacher's weights, the critic walks from the teacher's score to the student's. A stage's `copy`
    keeps where it got to as a role, and later stages of `vsd` follow these roles back.
    """

    cites: ClassVar[tuple[str, ...]] = ("2408.15991",)

    steps: tuple[float, ...] = (1.0,)
    """Levels u the student is sampled at."""
    times: choice("times") = Uniform(low=0.0, high=1.0)  # type: ignore[valid-type]
    """Noise level of the critic's denoising loss."""
    weight: Weight = "x0"
    """Weight of the critic's x0 error."""

    def __post_init__(self) -> None:
        check_steps(self.steps)

    def needs(self) -> Needs:
        return Needs(frozenset({"student", "critic"}), frozen=frozenset({"teacher", "student"}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("critic",), lambda batch: self.losses(roles, batch))

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond, grad=False).x
        yield Losses({"dsm": track(roles, batch, x, self.times, self.weight)})

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps)
