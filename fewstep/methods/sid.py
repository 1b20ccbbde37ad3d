"""Score identity distillation and its relatives: SiD, SIM, inverse matching, SiDA, SiD-LSG (arXiv 2404.04057)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.guidance import guided
from fewstep.algebra.points import fill_of
from fewstep.algebra.rollout import StepLists, listed, rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import LogNormal, SiDTimes, TimesPart, check_step_lists
from fewstep.config import Positive, part
from fewstep.methods.critic import Critic
from fewstep.methods.gan import Gan
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.readings import readings
from fewstep.methods.reward import Reward, add_reward, need_reward, reward_turns
from fewstep.methods.terms import noised
from fewstep.networks.roles import Roles


@part("method", "sid")
class SiD:
    """Minimise the Fisher divergence between noised student and teacher, with gradients through both denoisers."""

    cites: ClassVar[tuple[str, ...]] = (
        "2404.04057",
        "2410.16794",
        "2502.01362",
        "2410.14919",
        "2406.01561",
        "2510.03095",
    )

    steps: tuple[float, ...] = (1.0,)
    """Levels u of the student; SiD starts one step at sigma 2.5, u = 0.5 of the Karras grid 0.002 to 80."""
    step_lists: tuple[tuple[float, ...], ...] = ()
    """Lists of steps of which every update draws one, so that one student, or LoRA, takes the steps of each: [[1.0],
    [1.0, 0.5]]. `steps` is one of them, at which it is sampled where nothing else is asked (Hyper-SD's unified LoRA)."""
    alpha: float = 1.2
    """1.2 for CIFAR-10 and ImageNet-64, 1.0 for AFHQ; 0.5 is inverse matching, 1 with `huber` is SIM."""
    huber: float | None = None
    """c of SIM's pseudo-Huber distance over mean squares (a published c of a norm, divided by sqrt(d))."""
    normalize: bool = True
    """Divide by <|x - D_real|> per sample, as SiD's code does; SIM's distance stands for it."""
    loss_scale: float = 1.0
    """Factor on the loss. SiD's code has 100 on the sum over elements, here losses are means (Adam hides it)."""
    times: TimesPart = SiDTimes()
    """Noise level of the loss."""
    guidance: float = 1.0
    """Guidance scale of the teacher; 1 in the paper, kappa_4 of SiD-LSG (its script: 2)."""
    guide_critic: tuple[float, float] = (1.0, 1.0)
    """Scales of the critic in its own training and in the loss, kappa_1 and kappa_2 = kappa_3 of SiD-LSG (arXiv
    2406.01561; its script: 2 and 2). Off 1 the critic loses its condition in one row of ten, as there."""
    critic: Critic = Critic(times=LogNormal(), weight="edm")
    """EDM's noise levels, ln sigma ~ N(-1.2, 1.2^2), and its weight."""
    gan: Gan | None = None
    """SiDA's adversarial term on the critic's features; needs data. The released one is {weight: 1e-4,
    discriminator_weight: .033, times: {name: lognormal}, shares_noise: true} on CIFAR-10, and .0083 on ImageNet-64."""
    adversary_at: Literal["score", "fresh"] = "score"
    """Where the student meets it. score: at the score term's own noised sample, divided by the batch's mean of
    <|x - D_real|> (released code); fresh: at a level and noise of its own, undivided."""
    noise_scale: Positive = 1.0
    """Factor on the noise at sampling, training being at 1: see `Sampler`."""
    reward: Reward | None = None
    """A reward of the samples, maximised beside the method's own losses."""

    def __post_init__(self) -> None:
        check_step_lists(self.steps, self.step_lists)
        if self.huber is not None and self.huber <= 0:
            raise ValueError(f"huber must be positive, not {self.huber}; leave it out for the squared distance")
        if self.loss_scale <= 0:
            raise ValueError(f"loss_scale must be positive, not {self.loss_scale}")

    @property
    def kind(self) -> str:
        """Whose it is: settings of one paper are no yardstick for another's."""
        if self.guide_critic != (1.0, 1.0):
            return "sid-lsg"
        if self.gan is not None:
            return "sida"
        return "sim" if self.huber is not None else "inverse-matching" if self.alpha == 0.5 else "sid"

    def needs(self) -> Needs:
        roles = {"teacher", "student", "critic"} | ({"discriminator"} if self.gan else set())
        return need_reward(Needs(frozenset(roles), data=self.gan is not None, teacher_grad=True), self.reward, fits=True)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield self.critic.turn(roles, step, lambda batch: self.critic_losses(roles, batch), self.gan)
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch))
        yield from reward_turns(self.reward, roles, self.walked)

    @property
    def walked(self) -> tuple[float, ...] | StepLists:
        """What its rollouts take their steps from."""
        return listed(self.steps, self.step_lists)

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps, lists=self.step_lists, noise_scale=self.noise_scale)

    def student_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.walked, batch.cond).x
        yield self.loss(roles, batch, x)

    def loss(self, roles: Roles, batch: Batch, x: Tensor) -> Losses:
        """The inverse-matching loss of student samples x (b, *d) and the adversarial one, with readings.

        At the critic's optimum the first has the expectation (1 - alpha) times the weighted Fisher divergence: for
        alpha > 1 it is negative and rises to 0, so it does not measure progress.
        """
        x_tau, tau = noised(self.times, roles, batch, x)
        real = guided(roles.teacher, x_tau, tau, batch.cond, batch.null_cond, self.guidance)
        fake = guided(roles.critic, x_tau, tau, batch.cond, batch.null_cond, self.guide_critic[1])
        # The normaliser is a mean over the same points, so that padding cancels.
        fill = None if self.normalize and self.huber is None else fill_of(batch.cond)
        value = obj.inverse_matching(real, fake, x, alpha=self.alpha, huber=self.huber, fill=fill)
        scale = torch.ones_like(value)
        if self.normalize and self.huber is None:
            scale = obj.dmd_normalizer(x.detach(), real.x0.detach(), floor=1e-5).flatten()
        gap = obj.score_difference(fake, real).detach()
        # A guided critic does not denoise the student's samples, so its slope on them says nothing.
        own = fake if self.guide_critic[1] == 1 else None
        losses = Losses(
            {"match": self.loss_scale * (scale * value).mean()},
            readings(x.detach(), real, gap, own, batch.cond),
        )
        if self.gan and self.adversary_at == "score":
            losses["gan"] = self.gan.beside(roles, batch, x_tau, tau, scale)
        elif self.gan:
            losses["gan"] = self.gan.generator(roles, batch, x)
        return add_reward(losses, self.reward, roles, batch, x)

    def critic_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.walked, batch.cond, grad=False).x
        drop = 0.0 if self.guide_critic == (1.0, 1.0) else 0.1
        yield self.critic.losses(roles, batch, x, self.gan, drop_cond=drop, guidance=self.guide_critic[0])
