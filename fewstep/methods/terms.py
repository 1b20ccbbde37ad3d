"""Terms that several methods share: the critic's regression and the adversarial pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.condition import replaced
from fewstep.algebra.jump import ask, clean
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import add_noise, bc
from fewstep.algebra.times import Uniform
from fewstep.config import choice, config
from fewstep.methods.method import Losses
from fewstep.networks.roles import Roles
from fewstep.objectives.regression import Weight, x0_weight
from fewstep.objectives.trajectory import distance


def noised(times: Any, roles: Roles, batch: Batch, x: Tensor, **where: Any) -> tuple[Tensor, Tensor]:
    """(x_tau, tau): x at a fresh level of `times` with fresh noise; `where` goes to times.sample."""
    process: Any = roles.student.process
    tau = times.sample(batch.draws, process, **where)
    return add_noise(process, x, batch.noise(), tau)[0], tau


def dropped(batch: Batch, probability: float) -> Any:
    """The batch's condition with the null one in place of a random share of rows."""
    if probability == 0 or batch.cond is None or batch.null_cond is None:
        return batch.cond
    return replaced(batch.cond, batch.draws.uniform() < probability, batch.null_cond)


def track(
    roles: Roles, batch: Batch, x: Tensor, times: Any, weight: Weight, drop_cond: float = 0.0
) -> Tensor:
    """The critic's denoising loss on detached student samples x (b, *d); a scalar."""
    process: Any = roles.student.process
    t, eps = times.sample(batch.draws, process), batch.noise()
    return obj.dsm(roles.critic, x.detach(), t, eps, dropped(batch, drop_cond), weight=weight)


@config
class Gan:
    """A discriminator on noised samples beside a score method: its weights, noise levels and loss."""

    weight: float = 3e-3
    """Weight of the generator's loss (DMD2: ImageNet-64 3e-3, SD1.5 1e-3, SDXL 5e-3)."""
    discriminator_weight: float = 1e-2
    """Weight of the discriminator's loss beside the critic's (DMD2: 1e-2)."""
    times: choice("times") = Uniform(low=0.0, high=1.0)  # type: ignore[valid-type]
    """Noise level at which the discriminator looks."""
    loss: Literal["logistic", "hinge"] = "logistic"
    r1_weight: float = 0.0
    """Weight of the finite-difference R1 on real samples (APT, arXiv 2501.08316)."""

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.discriminator_weight <= 0:
            raise ValueError("weight and discriminator_weight must be positive; leave the gan out for none")
        if self.r1_weight < 0:
            raise ValueError(f"r1_weight must not be negative, not {self.r1_weight}")

    def look(self, roles: Roles, batch: Batch, x: Tensor) -> Tensor:
        """Logits (b, heads) of x at a fresh noise level."""
        x_tau, tau = noised(self.times, roles, batch, x)
        return roles.discriminator(x_tau, tau, batch.cond)

    def generator(self, roles: Roles, batch: Batch, x: Tensor) -> Tensor:
        """The student's weighted adversarial loss; the gradient flows through the discriminator into x."""
        loss = obj.logistic_generator if self.loss == "logistic" else obj.hinge_generator
        return self.weight * loss(self.look(roles, batch, x))

    def discriminator(self, roles: Roles, batch: Batch, x: Tensor) -> Losses:
        """The discriminator's weighted loss on real data against detached student samples, and its accuracy."""
        fake_logits = self.look(roles, batch, x.detach())
        seen, tau = noised(self.times, roles, batch, batch.data())
        real_logits = roles.discriminator(seen, tau, batch.cond)
        loss = obj.logistic_discriminator if self.loss == "logistic" else obj.hinge_discriminator
        losses = Losses({"discriminator": self.discriminator_weight * loss(real_logits, fake_logits)})
        if self.r1_weight:
            penalty = obj.r1_finite(lambda z: roles.discriminator(z, tau, batch.cond), seen, batch.noise())
            losses["r1"] = self.r1_weight * penalty
        hits = (real_logits > 0).float().mean() + (fake_logits < 0).float().mean()
        losses.log["discriminator_accuracy"] = (hits / 2).detach()
        return losses


Apart = Literal["mse", "l1", "huber", "huber_sample", "lpips"]
"""A distance of trajectory methods, or LPIPS by the frozen role `perceptual`."""


def apart(
    roles: Roles, a: Tensor, b: Tensor, kind: Apart, c: float = 1e-3, weight: Tensor | None = None
) -> Tensor:
    """The batch mean of weight (b,) times a distance of samples a and b (b, *d), a scalar."""
    if kind != "lpips":
        return distance(a, b, kind, c, weight)
    value = roles.perceptual(a, b)
    return (value if weight is None else value * weight.to(value.dtype)).mean()


def perceptual(kind: Any) -> set[str]:
    """The roles that a distance needs."""
    return {"perceptual"} if kind == "lpips" else set()


def discriminate(gan: Gan | None, roles: Roles, batch: Batch, times: Any) -> Iterator[Losses]:
    """The critic turn of a trajectory method: its discriminator on the student's jumps from noised data to clean."""
    assert gan is not None
    process: Any = roles.student.process
    with torch.no_grad():
        noised_data, t = noised(times, roles, batch, batch.data())
        end = clean(process, t)
        x = ask(roles.student, noised_data, t, end, batch.cond).at(end)
    losses = gan.discriminator(roles, batch, x)
    # The trunk keeps denoising the student's samples, so that its features stay those of images.
    losses["denoise"] = track(roles, batch, x, gan.times, "x0")
    yield losses


def scaled(c: Tensor, x: Tensor) -> Tensor:
    """c (b,) times x (b, *d)."""
    return bc(c, x) * x


def critic_error(prediction: Prediction, x: Tensor, weight: Weight) -> Tensor:
    """Weighted x0 error of a prediction against x, a scalar."""
    return obj.mse(prediction.x0, x, x0_weight(weight, prediction.process, prediction.t))
