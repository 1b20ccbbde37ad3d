"""Decoupled DMD: guidance augmentation drives, distribution matching regularises (arXiv 2511.22677)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.guidance import guided
from fewstep.algebra.noising import add_noise
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.rollout import exit_step, rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import Uniform, check_steps, shift
from fewstep.config import part
from fewstep.methods.critic import Critic
from fewstep.methods.gan import Gan
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.readings import readings
from fewstep.methods.reward import Reward, add_reward, need_reward
from fewstep.networks.roles import Roles


@part("method", "decoupled_dmd")
class DecoupledDMD:
    """DMD's guided gradient cut in two: DM = D_fake - D_cond and CA = (1 - w)(D_cond - D_null), each at its own level."""

    cites: ClassVar[tuple[str, ...]] = ("2511.22677",)

    steps: tuple[float, ...] = (1.0,)
    """Levels u the student is sampled at (Z-Image-Turbo: 8)."""
    guidance: float = 4.0
    """Guidance scale w of the teacher; CA carries w - 1."""
    schedule: Literal["coupled", "full", "constrained", "hybrid"] = "hybrid"
    """Levels of (DM, CA): coupled one for both; full two independent; constrained both cleaner than the
    student's input; hybrid only CA cleaner, which the paper found best."""
    times: Uniform = Uniform()
    """Level before constraining; a constrained one is uniform below the student's unshifted level, then shifted."""
    normalizer: Literal["shared", "separate", "cfg"] = "separate"
    """shared: <|x - D_cond|> at DM's level for both terms; separate: each term's own; cfg: DMD2's
    <|x - D_guided|>, for coupled only. The paper does not say; public code has separate ones."""
    regularizer: Literal["dm", "moments", "gan"] = "dm"
    """What keeps CA in check: distribution matching, the mean and variance of each sample, or a discriminator."""
    moments: tuple[float, float] = (0.075, 0.81)
    """Target mean and variance of a sample for the regulariser `moments` (SDXL latents)."""
    moments_weight: float = 1.0
    """Weight of the regulariser `moments`."""
    gan: Gan = Gan()
    """Discriminator of the regulariser `gan`; it needs data and a trunk."""
    critic: Critic = Critic(steps=5)
    """Of the regulariser `dm`; with `gan`, its steps are the discriminator's."""
    reward: Reward | None = None
    """A reward of the samples, maximised beside the method's own losses."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        self.gan.alone()
        if self.normalizer == "cfg" and (self.schedule, self.regularizer) != ("coupled", "dm"):
            raise ValueError("normalizer cfg needs one guided denoiser: schedule coupled, regularizer dm")
        for key in ("alignment", "reset_every") if self.regularizer != "dm" else ():
            if getattr(self.critic, key):
                raise ValueError(f"critic.{key}: regularizer {self.regularizer} has no critic; leave it out, or take dm")
        if self.moments[1] <= 0:
            raise ValueError(f"moments must be a mean and a positive variance, not {list(self.moments)}")

    def needs(self) -> Needs:
        extra = {"dm": {"critic"}, "moments": set(), "gan": {"discriminator"}}[self.regularizer]
        return need_reward(Needs(frozenset({"teacher", "student"} | extra), data=self.regularizer == "gan"), self.reward)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch))
        if self.regularizer == "dm":
            yield self.critic.turn(roles, step, lambda batch: self.critic_losses(roles, batch))
        if self.regularizer == "gan":
            yield Turn(("discriminator",), lambda batch: self.critic_losses(roles, batch), times=self.critic.steps)

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps)

    def student_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        last = exit_step(batch.draws, len(self.steps))
        x = rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond, exit=last).x
        gradient, log = self.gradient(roles, batch, x.detach(), self.steps[last])
        losses = Losses({"match": obj.surrogate_loss(x, gradient)}, log)
        if self.regularizer == "moments":
            losses["moments"] = self.moments_weight * obj.moment_divergence(x, *self.moments)
        if self.regularizer == "gan":
            losses["gan"] = self.gan.generator(roles, batch, x)
        yield add_reward(losses, self.reward, roles, batch, x)

    def below(self, batch: Batch, level: float) -> Tensor:
        """Levels u (b,) of `times`, squeezed under the unshifted `level` before the shift."""
        times = self.times
        unshifted = level / (times.shift + (1 - times.shift) * level)
        u = times.low + (times.high - times.low) * batch.draws.uniform()
        return shift(u * unshifted, times.shift)

    def renoise(self, roles: Roles, batch: Batch, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
        process: Any = roles.student.process
        tau = process.grid(self.below(batch, level))
        return add_noise(process, x, batch.noise(), tau)[0], tau

    @torch.no_grad()
    def gradient(self, roles: Roles, batch: Batch, x: Tensor, level: float) -> tuple[Tensor, dict[str, Tensor]]:
        """DM / n_DM + CA / n_CA for student samples x made at `level`, and readings."""
        x_ca, t_ca = self.renoise(roles, batch, x, level if self.schedule in ("constrained", "hybrid") else 1.0)
        cond = roles.teacher(x_ca, t_ca, batch.cond)
        guide = guided(roles.teacher, x_ca, t_ca, batch.cond, batch.null_cond, self.guidance)
        augment = cond.x0 - guide.x0
        weight = obj.dmd_normalizer(x, guide.x0 if self.normalizer == "cfg" else cond.x0)
        if self.regularizer != "dm":
            return augment * weight, readings(x, cond, augment * weight, cond=batch.cond)
        at: tuple[Tensor, Tensor, Prediction] = (x_ca, t_ca, cond)
        if self.schedule != "coupled":
            x_dm, t_dm = self.renoise(roles, batch, x, level if self.schedule == "constrained" else 1.0)
            at = (x_dm, t_dm, roles.teacher(x_dm, t_dm, batch.cond))
        fake = roles.critic(at[0], at[1], batch.cond)
        own = weight if self.normalizer == "cfg" else obj.dmd_normalizer(x, at[2].x0)
        match = obj.score_difference(fake, at[2]) * own
        gradient = match + augment * (own if self.normalizer == "shared" else weight)
        return gradient, readings(x, at[2], gradient, fake, batch.cond)

    def critic_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond, grad=False).x
        if self.regularizer == "gan":
            yield self.gan.discriminator(roles, batch, x)
            return
        yield self.critic.losses(roles, batch, x)
