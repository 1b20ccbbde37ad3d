"""Class-ratio training: a one-step model from teacher weights without the teacher's score (arXiv 2502.08005)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.rollout import rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import TimesPart, Uniform, check_steps
from fewstep.config import part
from fewstep.methods.gan import accuracy
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.readings import of_batch
from fewstep.methods.reward import Reward, add_reward, need_reward
from fewstep.methods.terms import noised
from fewstep.networks.roles import Roles


@part("method", "class_ratio")
class ClassRatio:
    """A classifier of noised real against noised student samples gives log p/q; the student climbs it."""

    cites: ClassVar[tuple[str, ...]] = ("2502.08005",)

    steps: tuple[float, ...] = (1.0,)
    """Levels u the student is sampled at."""
    divergence: Literal["rkl", "js"] = "js"
    """rkl: minimise -logit, whose gradient is DMD's; js: softplus(-logit), the non-saturating form."""
    times: TimesPart = Uniform(low=0.02, high=1.0)
    """Noise level at which classifier and student meet."""
    classifier_steps: int = 1
    """Classifier updates per student update."""
    train_trunk: bool = True
    """The classifier is the critic's encoder with heads, trained together from the teacher's weights."""
    reward: Reward | None = None
    """A reward of the samples, maximised beside the method's own losses."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.classifier_steps < 1:
            raise ValueError(f"classifier_steps must be at least 1, not {self.classifier_steps}")

    def needs(self) -> Needs:
        trunk = {"critic"} if self.train_trunk else set()
        return need_reward(Needs(frozenset({"student", "discriminator"} | trunk), data=True), self.reward)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        updates = ("critic", "discriminator") if self.train_trunk else ("discriminator",)
        yield Turn(updates, lambda batch: self.classifier_losses(roles, batch), times=self.classifier_steps)
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch))

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps)

    def logits(self, roles: Roles, batch: Batch, x: Tensor) -> Tensor:
        return roles.discriminator(*noised(self.times, roles, batch, x), batch.cond)

    def student_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond).x
        logits = self.logits(roles, batch, x)
        loss = F.softplus(-logits).mean() if self.divergence == "js" else -logits.mean()
        losses = Losses({"ratio": loss}, of_batch(x, batch.cond))
        yield add_reward(losses, self.reward, roles, batch, x)

    def classifier_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond, grad=False).x
        fake, real = self.logits(roles, batch, x), self.logits(roles, batch, batch.data())
        yield Losses(
            {"discriminator": obj.logistic_discriminator(real, fake)},
            {"discriminator_accuracy": accuracy(real, fake)},
        )
