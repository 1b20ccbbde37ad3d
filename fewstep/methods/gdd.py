"""GDD: a teacher's weights are an innate one-step generator; a GAN alone brings it out (arXiv 2405.20750)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.rollout import rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import check_steps
from fewstep.config import choice, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.readings import spread
from fewstep.methods.terms import noised
from fewstep.networks.roles import Roles


@part("method", "gdd")
class GDD:
    """Only an adversarial loss on the student's samples. GDD-I freezes most convolutions: `freeze`.

    With `times` set, the discriminator sees noised samples, which on the teacher's features is LADD.
    """

    cites: ClassVar[tuple[str, ...]] = ("2405.20750",)

    steps: tuple[float, ...] = (1.0,)
    """Levels u of the student; the paper has one, sigma 80."""
    times: choice("times") | None = None  # type: ignore[valid-type]
    """Noise level of what the discriminator sees; none shows clean samples at the process's lowest level."""
    loss: Literal["logistic", "hinge"] = "logistic"
    """Official default: logistic."""
    r1_weight: float = 0.01
    """gamma of R1 on real samples, (gamma / 2) |grad|^2 (official 0.01); 0 for none."""
    r1_every: int = 16
    """R1 is taken every so many steps and weighted as many times (official: 16)."""
    discriminator_steps: int = 1
    """Discriminator updates per student update."""
    freeze: tuple[str, ...] = ()
    """GDD-I: student parameters whose name holds one of these never move (official: conv, proj, then qkv, skip
    inside the blocks). Norms learn, conv_norm_out too, unless an entry names them."""
    train_trunk: bool = False
    """True trains the critic that carries the heads with them, for runs without a pre-trained trunk."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.r1_weight < 0:
            raise ValueError(f"r1_weight must not be negative, not {self.r1_weight}")
        for name in ("r1_every", "discriminator_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def needs(self) -> Needs:
        trunk = {"critic"} if self.train_trunk else set()
        return Needs(frozenset({"student", "discriminator"} | trunk), data=True)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch))
        updates = ("critic", "discriminator") if self.train_trunk else ("discriminator",)
        r1 = bool(self.r1_weight) and step % self.r1_every == 0
        yield Turn(
            updates, lambda batch: self.discriminator_losses(roles, batch, r1), times=self.discriminator_steps
        )

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps)

    def hold(self, roles: Roles) -> None:
        """Take the frozen parameters out of this turn's graph; without a gradient no optimiser moves them."""
        for name, parameter in roles.student.named_parameters():
            if any(part in name and ("norm" in part or "norm" not in name) for part in self.freeze):
                parameter.requires_grad_(False)

    def shown(self, roles: Roles, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the discriminator sees of x, and the time it is told."""
        if self.times is not None:
            return noised(self.times, roles, batch, x)
        process: Any = roles.student.process
        lowest = torch.full((len(x),), 1e-3, dtype=torch.float64, device=x.device)
        return x, process.grid(lowest)

    def student_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        self.hold(roles)
        x = rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond).x
        logits = roles.discriminator(*self.shown(roles, batch, x), batch.cond)
        loss = obj.logistic_generator if self.loss == "logistic" else obj.hinge_generator
        yield Losses({"gan": loss(logits)}, {"health/diversity": spread(x, batch.cond)})

    def discriminator_losses(self, roles: Roles, batch: Batch, r1: bool) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond, grad=False).x
        fake = roles.discriminator(*self.shown(roles, batch, x), batch.cond)
        seen, tau = self.shown(roles, batch, batch.data())
        real = roles.discriminator(seen, tau, batch.cond)
        loss = obj.logistic_discriminator if self.loss == "logistic" else obj.hinge_discriminator
        losses = Losses({"discriminator": loss(real, fake)})
        if r1:
            penalty = obj.r1_exact(lambda z: roles.discriminator(z, tau, batch.cond), seen)
            losses["r1"] = 0.5 * self.r1_weight * self.r1_every * penalty
        hits = (real > 0).float().mean() + (fake < 0).float().mean()
        losses.log["discriminator_accuracy"] = (hits / 2).detach()
        yield losses
