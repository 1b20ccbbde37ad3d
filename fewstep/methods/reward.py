"""A reward beside a method's own losses: the term, and what a method with one asks of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.rollout import StepLists, rollout
from fewstep.config import Bounded, Count, NotNegative, config
from fewstep.methods.method import Losses, Method, Needs, Turn
from fewstep.networks.roles import Roles


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

    by: Literal["reward", "latent_reward"] = "reward"
    """Whose gradient the samples follow: the reward's own, or that of the role latent_reward, which learns the reward of
    the student's samples beside them (DOLLAR, arXiv 2412.15689), so that the reward itself needs none."""
    model_steps: Count = 1
    """Updates of latent_reward per student update."""

    def __post_init__(self) -> None:
        if self.after < 0:
            raise ValueError(f"after must not be negative, not {self.after}")

    def losses(self, roles: Roles, batch: Batch, x: Tensor) -> Losses:
        """The weighted loss of samples x (b, *d) once it has begun, and the mean reward as a reading."""
        on = batch.step >= self.after
        # Rewards are small differences of large numbers more often than not: never in half precision.
        with torch.set_grad_enabled(on and x.requires_grad), torch.autocast(x.device.type, enabled=False):
            value = roles[self.by](x, batch.cond)
            missing = (self.threshold - value).clamp_min(0) if self.kind == "hinge" else -value
            loss = self.weight * missing.mean()
        name = "reward" if self.by == "reward" else "reward_predicted"
        return Losses({"reward_loss": loss} if on else {}, {name: value.detach().mean()})

    def fit(self, roles: Roles, batch: Batch, x: Tensor) -> Losses:
        """The squared error of latent_reward at samples x (b, *d), and the mean of the reward itself."""
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                value = roles.reward(x, batch.cond)
            # As `losses` calls it, whose gradient is what it is for.
            error = roles.latent_reward(x.detach(), batch.cond) - value
        return Losses({"reward_fit": (error**2).mean()}, {"reward": value.mean()})


def need_reward(needs: Needs, reward: Reward | None, *, fits: bool = False) -> Needs:
    """What a method with this term asks of a run.

    fits: whether the method has turns for latent_reward (`reward_turns`). ValueError for a term that wants them where
    there are none.
    """
    if reward is None:
        return needs
    if reward.by == "reward":
        return replace(needs, roles=needs.roles | {"reward"}, reward="gradient")
    if not fits:
        raise ValueError("reward.by latent_reward: this method trains none; dmd2, sid, f_distill, uni_instruct, vsd do")
    return replace(needs, roles=needs.roles | {"reward", "latent_reward"}, reward="value")


def follows_reward(method: Method, step: int) -> bool:
    """Whether the student follows the role `reward` once `step` updates of the stage are done: in a method within a
    joint one from where both begin, under a weight of 0 never."""
    if not method.needs().reward:
        return False
    if shares := getattr(method, "methods", ()):
        return any(step >= share.start and follows_reward(share.method, step) for share in shares)
    term = getattr(method, "reward", None)
    return term.weight > 0 and step >= term.after if isinstance(term, Reward) else True


def add_reward(losses: Losses, reward: Reward | None, roles: Roles, batch: Batch, x: Tensor) -> Losses:
    """A method's losses with those of the term, where it has one."""
    return losses if reward is None else losses.join(reward.losses(roles, batch, x))


def reward_turns(
    reward: Reward | None, roles: Roles, samples: tuple[float, ...] | StepLists | Callable[[Batch], Tensor]
) -> Iterator[Turn]:
    """The turn in which latent_reward learns from fresh samples of the student; none without one.

    samples: the levels that the student re-noises at, or what makes the samples (b, *d) of a batch, without a gradient.
    """
    if reward is None or reward.by == "reward":
        return

    def losses(batch: Batch) -> Iterator[Losses]:
        if callable(samples):
            x = samples(batch)
        else:
            x = rollout(roles.student, batch.draws, batch.shape, samples, batch.cond, grad=False).x
        yield reward.fit(roles, batch, x)

    yield Turn(("latent_reward",), losses, times=reward.model_steps)
