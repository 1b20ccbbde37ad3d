"""Let the critic learn the score of a frozen student: warm-up of critics, DisBack's recording (arXiv 2408.15991)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from fewstep.algebra.batch import Batch
from fewstep.algebra.rollout import rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import check_steps
from fewstep.config import part
from fewstep.methods.critic import Critic
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles


@part("method", "track")
class Track:
    """Denoising score matching of the critic on samples of a student that stays as it is.

    From the teacher's weights, the critic walks from the teacher's score to the student's. A stage's `copy`
    keeps where it got to as a role, and later stages of `vsd` follow these roles back.
    """

    cites: ClassVar[tuple[str, ...]] = ("2408.15991",)

    steps: tuple[float, ...] = (1.0,)
    """Levels u the student is sampled at."""
    critic: Critic = Critic()
    """Its steps are those within one step of the stage."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        for key in ("alignment", "reset_every"):
            if getattr(self.critic, key):
                raise ValueError(
                    f"critic.{key}: the student stands still here, so there is nothing to keep up with; give 0"
                )

    def needs(self) -> Needs:
        return Needs(frozenset({"student", "critic"}), frozen=frozenset({"teacher", "student"}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield self.critic.turn(roles, step, lambda batch: self.losses(roles, batch))

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond, grad=False).x
        yield self.critic.losses(roles, batch, x)

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps)
