"""The discriminator of a method: weights, the noise levels at which it looks, its losses."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.times import TimesPart, Uniform
from fewstep.config import config
from fewstep.methods.method import Losses
from fewstep.methods.terms import noised
from fewstep.networks.roles import Roles
from fewstep.objectives.reduce import global_mean


@config
class Gan:
    """A discriminator of real and student samples: the weights, the noise levels at which it looks, and its loss."""

    weight: float = 3e-3
    """Weight of the generator's loss (DMD2: ImageNet-64 3e-3, SD1.5 1e-3, SDXL 5e-3)."""
    discriminator_weight: float = 1e-2
    """Weight of the discriminator's loss beside the critic's (DMD2: 1e-2)."""
    times: TimesPart | None = Uniform(low=0.0, high=1.0)
    """Noise level at which the discriminator looks; null shows clean samples, at the process's lowest level."""
    loss: Literal["logistic", "hinge"] = "logistic"
    """DMD2 and GDD: logistic (softplus); LADD: hinge."""
    r1_weight: float = 0.0
    """Weight of R1 on real samples. FastGen uses 100 to 1000 on its scale: heads are summed here before the square, so
    that n equal ones give n^2 of its term."""
    r1: Literal["finite", "exact"] = "finite"
    """finite: differences of logits (APT, arXiv 2501.08316); exact: |grad|^2, whose weight is the usual gamma / 2."""
    shares_noise: bool = False
    """True: the discriminator trains at the critic's levels, on the features of its denoising call: a pass less."""

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.discriminator_weight <= 0:
            raise ValueError("weight and discriminator_weight must be positive; `gan: null` is no discriminator")
        if self.r1_weight < 0:
            raise ValueError(f"r1_weight must not be negative, not {self.r1_weight}")

    def alone(self, times: bool = True) -> None:
        """ValueError for a key that needs a critic's turn, in methods that have none; times: whether these are read."""
        if not times and self.times != type(self)().times:
            raise ValueError("gan.times: the levels of this method's discriminator are the method's own; leave it out")
        if self.shares_noise:
            raise ValueError("gan.shares_noise: no critic trains beside the discriminator of this method")

    def shown(self, roles: Roles, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the discriminator sees of x (b, *d), and the time (b,) that it is told."""
        if self.times is not None:
            return noised(self.times, roles, batch, x)
        process: Any = roles.student.process
        return x, process.grid(torch.full((len(x),), 1e-3, dtype=torch.float64, device=x.device))

    def look(self, roles: Roles, batch: Batch, x: Tensor) -> Tensor:
        """Logits (b, heads) of x at a fresh noise level."""
        return roles.discriminator(*self.shown(roles, batch, x), batch.cond)

    def generator(self, roles: Roles, batch: Batch, x: Tensor) -> Tensor:
        """The student's weighted adversarial loss; the gradient flows through the discriminator into x."""
        return self.weight * self._fooled(self.look(roles, batch, x))

    def at(self, roles: Roles, batch: Batch, x: Tensor, t: Tensor) -> Tensor:
        """`generator` of x (b, *d) as it is, at time t (b,): no noise is added."""
        return self.weight * self._fooled(roles.discriminator(x, t, batch.cond))

    def beside(self, roles: Roles, batch: Batch, x_tau: Tensor, tau: Tensor, scale: Tensor) -> Tensor:
        """`generator` at a score term's own noised sample, times the mean of that term's `scale` (b,); a scalar.

        So SiDA and Uni-Instruct have it, 1 / <|x - D_real|> being the scale and logits within +-10
        (mingyuanzhou/SiD, sida_training/sida_loss.py).
        """
        logits = roles.discriminator(x_tau, tau, batch.cond).clamp(-10, 10)
        return self.weight * global_mean(scale.detach()) * self._fooled(logits)

    def _fooled(self, logits: Tensor) -> Tensor:
        return obj.logistic_generator(logits) if self.loss == "logistic" else obj.hinge_generator(logits)

    def discriminator(self, roles: Roles, batch: Batch, x: Tensor, fakes: Batch | None = None) -> Losses:
        """The discriminator's weighted loss on real data against detached student samples, and its accuracy.

        fakes: the batch whose conditions x was made under, where it is not `batch`.
        """
        fake = self.look(roles, fakes or batch, x.detach())
        return self.judge(roles, batch, fake, *self.shown(roles, batch, batch.data()))

    def judge(self, roles: Roles, batch: Batch, fake: Tensor, seen: Tensor, tau: Tensor, r1: float = 1.0) -> Losses:
        """`discriminator` from the logits (b, heads) of student samples and real samples seen at tau.

        r1: factor on R1's weight, 0 for none (lazy R1 takes it rarely and as many times as large).
        """
        real = roles.discriminator(seen, tau, batch.cond)
        loss = obj.logistic_discriminator if self.loss == "logistic" else obj.hinge_discriminator
        losses = Losses({"discriminator": self.discriminator_weight * loss(real, fake)})
        if r1 * self.r1_weight:

            def logits(z: Tensor) -> Tensor:
                return roles.discriminator(z, tau, batch.cond)

            exact = self.r1 == "exact"
            penalty = obj.r1_exact(logits, seen) if exact else obj.r1_finite(logits, seen, batch.noise())
            losses["r1"] = r1 * self.r1_weight * penalty
        losses.log["discriminator_accuracy"] = accuracy(real, fake)
        return losses


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """The share of logits (b, heads) with the right sign, without a gradient; a scalar."""
    return (((real > 0).float().mean() + (fake < 0).float().mean()) / 2).detach()
