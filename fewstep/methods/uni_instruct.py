"""Uni-Instruct: the time-expanded f-divergences as inverse matching with a density ratio (arXiv 2505.20755)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.guidance import guided
from fewstep.algebra.rollout import StepLists, listed, rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import LogNormal, SiDTimes, TimesPart, check_step_lists
from fewstep.config import part
from fewstep.methods.critic import Critic
from fewstep.methods.gan import Gan
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.readings import readings
from fewstep.methods.reward import Reward, add_reward, need_reward, reward_turns
from fewstep.methods.terms import noised
from fewstep.networks.roles import Roles
from fewstep.objectives.divergence import Expanded
from fewstep.objectives.reduce import global_mean


@part("method", "uni_instruct")
class UniInstruct:
    """SiD with an alpha and a weight per sample that depend on the density ratio, plus the adversarial term."""

    cites: ClassVar[tuple[str, ...]] = ("2505.20755",)

    steps: tuple[float, ...] = (1.0,)
    """Levels u of the student; the official runs start at sigma 2.5 as SiD does."""
    step_lists: tuple[tuple[float, ...], ...] = ()
    """Lists of steps of which every update draws one, so that one student, or LoRA, takes the steps of each: [[1.0],
    [1.0, 0.5]]. `steps` is one of them, at which it is sampled where nothing else is asked (Hyper-SD's unified LoRA)."""
    divergence: Expanded = "fkl"
    """fkl gave the best published FID; rkl needs no ratio and is SiD with alpha 1/2."""
    times: TimesPart = SiDTimes()
    """Noise level of the loss."""
    normalize: bool = True
    """Divide by <|x - D_real|> per sample, as SiD does."""
    ratio_clip: tuple[float, float] = (0.05, 10.0)
    """Smallest and largest p_fake / p_real; where it is clipped it no longer varies with x_t. p_real / p_fake then lies
    in [.1, 20], as in f_distill; the released code has another ratio and no such bounds."""
    normalize_ratio: bool = False
    """Divide the weight by its mean over the batch (the official "variance reduction", up to the batch size)."""
    stop_grad_ratio: bool = False
    """True detaches the ratio, as the released code does; the gradient is then not the divergence's."""
    guidance: float = 1.0
    """Guidance scale of the teacher."""
    critic: Critic = Critic(times=LogNormal(), weight="edm")
    """As SiD's."""
    gan: Gan = Gan(weight=1e-4, discriminator_weight=0.033, times=LogNormal(), shares_noise=True)
    """The discriminator that gives the ratio, and its adversarial loss. Released: .01 beside 100 times a sum over d
    elements, 1e-4 on means; half the mean of EDM's weight beside a sum, .033 on CIFAR-10 (d = 3072) and .0083 on
    ImageNet-64; at the critic's levels and noise."""
    adversary_at: Literal["score", "fresh"] = "score"
    """As SiD's: at the score term's own noised sample and divided by its omega = <|x - D_real|>, or a fresh look."""
    reward: Reward | None = None
    """A reward of the samples, maximised beside the method's own losses."""

    def __post_init__(self) -> None:
        check_step_lists(self.steps, self.step_lists)
        if not 0 < self.ratio_clip[0] < self.ratio_clip[1]:
            raise ValueError(f"ratio_clip must be 0 < low < high, not {list(self.ratio_clip)}")

    def needs(self) -> Needs:
        roles = frozenset({"teacher", "student", "critic", "discriminator"})
        return need_reward(Needs(roles, data=True, teacher_grad=True), self.reward, fits=True)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield self.critic.turn(roles, step, lambda batch: self.critic_losses(roles, batch), self.gan)
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch))
        yield from reward_turns(self.reward, roles, self.walked)

    @property
    def walked(self) -> tuple[float, ...] | StepLists:
        """What its rollouts take their steps from."""
        return listed(self.steps, self.step_lists)

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps, lists=self.step_lists)

    def student_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.walked, batch.cond).x
        yield self.loss(roles, batch, x)

    def loss(self, roles: Roles, batch: Batch, x: Tensor) -> Losses:
        """Inverse matching of student samples x with the divergence's alpha and weight, the GAN's loss, and readings."""
        x_tau, tau = noised(self.times, roles, batch, x)
        real = guided(roles.teacher, x_tau, tau, batch.cond, batch.null_cond, self.guidance)
        fake = roles.critic(x_tau, tau, batch.cond)
        ratio = (-roles.discriminator(x_tau, tau, batch.cond).mean(1)).exp().clamp(*self.ratio_clip)
        alpha, weight = obj.expanded_divergence(self.divergence, ratio.detach() if self.stop_grad_ratio else ratio)
        if self.normalize_ratio:
            weight = weight / global_mean(weight)
        value = obj.inverse_matching(real, fake, x, alpha=alpha, ratio=weight)
        scale = torch.ones_like(value)
        if self.normalize:
            scale = obj.dmd_normalizer(x.detach(), real.x0.detach(), floor=1e-5).flatten()
        gap = obj.score_difference(fake, real).detach()
        losses = Losses({"match": (scale * value).mean()}, readings(x.detach(), real, gap, fake, batch.cond))
        if self.adversary_at == "score":
            losses["gan"] = self.gan.beside(roles, batch, x_tau, tau, scale)
        else:
            losses["gan"] = self.gan.generator(roles, batch, x)
        return add_reward(losses, self.reward, roles, batch, x)

    def critic_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.walked, batch.cond, grad=False).x
        yield self.critic.losses(roles, batch, x, self.gan)
