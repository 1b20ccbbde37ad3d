"""A reward beside a method's own losses: the term, and what a method with one asks of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.config import Bounded, NotNegative, config
from fewstep.methods.method import Losses, Needs
from fewstep.networks.roles import Roles

REWARD = "reward"
"""The role that judges samples, and the name of its mean in the log."""


@config
class Reward:
    """The frozen role `reward`, r(x, cond) -> (b,), maximised over the student's samples with a gradient through x."""

    weight: NotNegative
    """w of the loss w <-r>, or w <max(0, threshold - r)>. It depends on the reward's scale and wants to be swept (DMDR:
    .05 for the log-probability of a class, .2 for CLIP, .5 for HPS)."""
    kind: Literal["linear", "hinge"] = "linear"
    """hinge leaves samples alone whose reward is above the threshold (ReFL, arXiv 2304.05977; DMDR's text models)."""
    threshold: Bounded = 0.7
    """Of the hinge, in units of the reward (DMDR: .7)."""
    after: int = 0
    """Student updates of the stage before it begins, a cold start by the method alone (DMDR: 20,000)."""

    def __post_init__(self) -> None:
        if self.after < 0:
            raise ValueError(f"after must not be negative, not {self.after}")

    def losses(self, roles: Roles, batch: Batch, x: Tensor, by: str = REWARD) -> Losses:
        """The weighted loss of samples x (b, *d) once it has begun, and the mean reward as a reading, `reward`.

        by: the role that is asked.
        """
        on = batch.step >= self.after
        # Rewards are small differences of large numbers more often than not: never in half precision.
        with torch.set_grad_enabled(on and x.requires_grad), torch.autocast(x.device.type, enabled=False):
            value = roles[by](x, batch.cond)
            missing = (self.threshold - value).clamp_min(0) if self.kind == "hinge" else -value
            loss = self.weight * missing.mean()
        return Losses({"reward_loss": loss} if on else {}, {REWARD: value.detach().mean()})


def need_reward(needs: Needs, reward: Reward | None) -> Needs:
    """What a method with this term asks of a run."""
    return needs if reward is None else replace(needs, roles=needs.roles | {REWARD}, reward="gradient")


def add_reward(losses: Losses, reward: Reward | None, roles: Roles, batch: Batch, x: Tensor) -> Losses:
    """A method's losses with those of the term, where it has one."""
    return losses if reward is None else losses.join(reward.losses(roles, batch, x))
