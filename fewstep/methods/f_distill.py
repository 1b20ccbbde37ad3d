"""f-distill: distribution matching under any f-divergence, by weighing DMD2's gradient (arXiv 2502.15681)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.guidance import guided
from fewstep.algebra.noising import angle_of
from fewstep.algebra.rollout import StepLists, listed, rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import TimesPart, Uniform, check_step_lists
from fewstep.config import part
from fewstep.methods.critic import Critic
from fewstep.methods.gan import Gan
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.readings import readings
from fewstep.methods.reward import Reward, add_reward, need_reward, reward_turns
from fewstep.methods.terms import noised, scaled
from fewstep.networks.roles import Roles
from fewstep.objectives.divergence import Divergence
from fewstep.objectives.reduce import bin_means, global_mean


class RatioBins(nn.Module):
    """Moving averages (bins,) of the density ratio by noise level; 1 in a bin that was never seen."""

    mean: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(bins, dtype=torch.float64))

    @torch.no_grad()
    def normalize(self, ratio: Tensor, place: Tensor, decay: float) -> Tensor:
        """Fold in this batch's means and divide each ratio (b,) by the average of its bin place (b,)."""
        mean, seen = bin_means(ratio, place, len(self.mean))
        self.mean.copy_(torch.where(seen, decay * self.mean + (1 - decay) * mean, self.mean))
        return ratio / self.mean[place].to(ratio.dtype)


@part("method", "f_distill")
class FDistill:
    """DMD2 whose gradient is weighed per sample by h(p_real / p_fake), the ratio read from the discriminator."""

    cites: ClassVar[tuple[str, ...]] = ("2502.15681",)

    steps: tuple[float, ...] = (1.0,)
    """Levels u the student is sampled at."""
    step_lists: tuple[tuple[float, ...], ...] = ()
    """Lists of steps of which every update draws one, so that one student, or LoRA, takes the steps of each: [[1.0],
    [1.0, 0.5]]. `steps` is one of them, at which it is sampled where nothing else is asked (Hyper-SD's unified LoRA)."""
    divergence: Divergence = "js"
    """js is the official default and ImageNet's; CIFAR-10 used fkl; rkl is DMD2."""
    times: TimesPart = Uniform()
    """Re-noising level of the score difference."""
    guidance: float = 1.0
    """Guidance scale of the real score."""
    critic: Critic = Critic(steps=5)
    """5 updates per student update, or 10 for SD1.5."""
    gan: Gan = Gan()
    """The discriminator that gives the ratio, and its adversarial loss."""
    logit_clip: float = 10.0
    """Logits are clamped to +- this before the exponential (official code)."""
    ratio_clip: tuple[float, float] = (0.1, 20.0)
    """Smallest and largest ratio (official code)."""
    bins: int = 10
    """Noise-level bins by whose mean the ratio is divided; 0 for none."""
    bin_decay: float = 0.0
    """Moving average of the bins: 0 uses the current batch, ImageNet-64 has 0.5."""
    normalize: bool = True
    """Divide h by its mean over the batch, so that the divergence does not change the step size."""
    reward: Reward | None = None
    """A reward of the samples, maximised beside the method's own losses."""

    def __post_init__(self) -> None:
        check_step_lists(self.steps, self.step_lists)
        if not 0 < self.ratio_clip[0] < self.ratio_clip[1]:
            raise ValueError(f"ratio_clip must be 0 < low < high, not {list(self.ratio_clip)}")
        if self.bins < 0 or not 0 <= self.bin_decay < 1:
            raise ValueError(f"need bins >= 0 and 0 <= bin_decay < 1, not {self.bins}, {self.bin_decay}")

    def needs(self) -> Needs:
        roles = frozenset({"teacher", "student", "critic", "discriminator"})
        needs = Needs(roles, data=True, state=(lambda data: RatioBins(self.bins)) if self.bins else None)
        return need_reward(needs, self.reward, fits=True)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch))
        yield self.critic.turn(roles, step, lambda batch: self.critic_losses(roles, batch), self.gan)
        yield from reward_turns(self.reward, roles, self.walked)

    @property
    def walked(self) -> tuple[float, ...] | StepLists:
        """What its rollouts take their steps from."""
        return listed(self.steps, self.step_lists)

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps, lists=self.step_lists)

    def student_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.walked, batch.cond).x
        gradient, log = self.gradient(roles, batch, x.detach())
        losses = Losses({"match": obj.surrogate_loss(x, gradient)}, log)
        losses["gan"] = self.gan.generator(roles, batch, x)
        yield add_reward(losses, self.reward, roles, batch, x)

    @torch.no_grad()
    def gradient(self, roles: Roles, batch: Batch, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """h(r) (D_fake - D_real) / <|x - D_real|> at a fresh noise level, and readings."""
        x_tau, tau = noised(self.times, roles, batch, x)
        real = guided(roles.teacher, x_tau, tau, batch.cond, batch.null_cond, self.guidance)
        fake = roles.critic(x_tau, tau, batch.cond)
        gradient = obj.score_difference(fake, real) * obj.dmd_normalizer(x, real.x0)
        h = self.weight(roles, x_tau, tau, batch.cond)
        gradient = scaled(h, gradient)
        return gradient, {**readings(x, real, gradient, fake, batch.cond), "h_largest": h.max()}

    def weight(self, roles: Roles, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """h of the clipped and normalised density ratio at noised samples, (b,)."""
        logit = roles.discriminator(x, t, cond).mean(1).clamp(-self.logit_clip, self.logit_clip)
        ratio = logit.exp().clamp(*self.ratio_clip)
        if self.bins:
            place = (angle_of(roles.student.process, t) / (torch.pi / 2) * self.bins).long()
            ratio = roles.state.normalize(ratio, place.clamp(0, self.bins - 1), self.bin_decay)
        h = obj.divergence_weight(self.divergence, ratio)
        return h / global_mean(h) if self.normalize else h

    def critic_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.walked, batch.cond, grad=False).x
        yield self.critic.losses(roles, batch, x, self.gan)
