"""DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis (arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.guidance import guided
from fewstep.algebra.process import add_noise
from fewstep.algebra.rollout import rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import Uniform, check_steps
from fewstep.config import choice, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.readings import readings
from fewstep.networks.roles import Roles
from fewstep.objectives.regression import Weight, x0_weight


@part("method", "dmd2")
class DMD2:
    """Match the student's noised distribution to the teacher's; a critic tracks the student, a GAN anchors it to data."""

    cites: ClassVar[tuple[str, ...]] = ("2405.14867", "2311.18828")

    steps: tuple[float, ...] = (1.0,)
    """Levels u the student is sampled at, from the prior down (SDXL 4-step: 1, .75, .5, .25)."""
    times: choice("times") = Uniform()  # type: ignore[valid-type]
    """Re-noising level of the score difference; U(0.02, 0.98) in the official code."""
    critic_steps: int = 5
    """Critic updates per student update: 5 for ImageNet-64 and SDXL, 10 for SD1.5 (sec. 4.2)."""
    critic_times: choice("times") = Uniform(low=0.0, high=1.0)  # type: ignore[valid-type]
    """Noise level of the critic's denoising loss; it must see all of [0, 1]."""
    critic_weight: Weight = "x0"
    """Weight of the critic's x0 error: "edm" for EDM networks, "eps" for SD and SDXL (official code)."""
    guidance: float = 1.0
    """Guidance scale of the real score only: 1.75 for SD1.5, 8 for SDXL; 1 is none."""
    gan_weight: float = 3e-3
    """Weight of the generator's GAN loss (ImageNet-64 3e-3, SD1.5 1e-3, SDXL 5e-3); 0 removes GAN and data."""
    discriminator_weight: float = 1e-2
    """Weight of the discriminator's loss beside the critic's (official: 1e-2)."""
    gan_times: choice("times") = Uniform(low=0.0, high=1.0)  # type: ignore[valid-type]
    """Noise level at which the discriminator looks."""
    gan_loss: Literal["logistic", "hinge"] = "logistic"
    """Official: logistic (softplus)."""
    gan_shares_noise: bool = False
    """True: the discriminator trains at the critic's levels, on the features of its denoising call: a pass less."""
    share_rollout: bool = False
    """True: the first critic update of a step trains on the samples of the student's turn: a rollout less."""
    r1_weight: float = 0.0
    """Weight of the finite-difference R1 of the discriminator (APT; FastGen uses 100 to 1000 on its scale)."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.critic_steps < 1:
            raise ValueError(f"critic_steps must be at least 1, not {self.critic_steps}")
        if min(self.gan_weight, self.discriminator_weight, self.r1_weight) < 0:
            raise ValueError("gan_weight, discriminator_weight and r1_weight must not be negative")

    def needs(self) -> Needs:
        gan = frozenset({"discriminator"}) if self.gan_weight else frozenset()
        return Needs(frozenset({"teacher", "student", "critic"}) | gan, data=bool(self.gan_weight))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        made: list[tuple[Tensor, Any]] | None = [] if self.share_rollout else None
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch, made))
        # One turn for critic and head: two optimisers over one trunk would cancel the weight of the GAN loss.
        updates = ("critic", "discriminator") if self.gan_weight else ("critic",)
        again = lambda: (made.pop(0),) if made else ()  # noqa: E731
        yield Turn(updates, lambda batch: self.critic_losses(roles, batch, *again()), times=self.critic_steps)

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps)

    def student_losses(
        self, roles: Roles, batch: Batch, made: list[tuple[Tensor, Any]] | None = None
    ) -> Iterator[Losses]:
        """The losses of the student's turn; its samples and their conditions are appended to `made`."""
        x = rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond).x
        if made is not None:
            made.append((x.detach(), batch.cond))
        log: dict[str, Tensor] = {}
        losses = Losses({"match": obj.toward(x, self.gradient(roles, batch, x.detach(), log))}, log)
        if self.gan_weight:
            loss = obj.logistic_generator if self.gan_loss == "logistic" else obj.hinge_generator
            losses["gan"] = self.gan_weight * loss(self.look(roles, batch, x))
        yield losses

    def gradient(self, roles: Roles, batch: Batch, x: Tensor, log: dict[str, Tensor] | None = None) -> Tensor:
        """(D_fake - D_real) / <|x - D_real|> at a fresh noise level (DMD eq. 7 and 8); readings go to `log`."""
        process: Any = roles.student.process
        tau = self.times.sample(batch.draws, process)
        x_tau, _ = add_noise(process, x, batch.noise(), tau)
        with torch.no_grad():
            real = guided(roles.teacher, x_tau, tau, batch.cond, batch.null_cond, self.guidance)
            fake = roles.critic(x_tau, tau, batch.cond)
        gradient = obj.score_difference(fake, real) * obj.dmd_normalizer(x, real.x0)
        if log is not None:
            log.update(readings(x, real, gradient, fake, batch.cond))
        return gradient

    def look(self, roles: Roles, batch: Batch, x: Tensor) -> Tensor:
        """Discriminator logits of x at a fresh noise level."""
        process: Any = roles.student.process
        tau = self.gan_times.sample(batch.draws, process)
        return roles.discriminator(add_noise(process, x, batch.noise(), tau)[0], tau, batch.cond)

    def critic_losses(
        self, roles: Roles, batch: Batch, made: tuple[Tensor, Any] | None = None
    ) -> Iterator[Losses]:
        """The losses of critic and head, on fresh samples of the student or on given ones with their conditions."""
        process: Any = roles.student.process
        fakes = batch if made is None else replace(batch, cond=made[1])
        if made is not None:
            x = made[0]
        else:
            x = rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond, grad=False).x
        t, eps = self.critic_times.sample(batch.draws, process), batch.noise()
        x_t, _ = add_noise(process, x, eps, t)
        shared = bool(self.gan_weight) and self.gan_shares_noise
        taps = roles.discriminator.taps if shared else ()
        denoised = roles.critic(x_t, t, fakes.cond, taps=taps)
        losses = Losses({"dsm": obj.mse(denoised.x0, x, x0_weight(self.critic_weight, process, t))})
        if self.gan_weight:
            real = batch.data()
            if shared:
                fake_logits = roles.discriminator.logits(denoised.features)
            else:
                fake_logits = self.look(roles, fakes, x)
            # Real and fake must come from one distribution of levels, or the logit learns the level's odds.
            tau = t if shared else self.gan_times.sample(batch.draws, process)
            seen, _ = add_noise(process, real, batch.noise(), tau)
            real_logits = roles.discriminator(seen, tau, batch.cond)
            loss = obj.logistic_discriminator if self.gan_loss == "logistic" else obj.hinge_discriminator
            losses["discriminator"] = self.discriminator_weight * loss(real_logits, fake_logits)
            if self.r1_weight:
                penalty = obj.r1_finite(
                    lambda z: roles.discriminator(z, tau, batch.cond), seen, batch.noise()
                )
                losses["r1"] = self.r1_weight * penalty
            hits = (real_logits > 0).float().mean() + (fake_logits < 0).float().mean()
            losses.log["discriminator_accuracy"] = (hits / 2).detach()
        yield losses
