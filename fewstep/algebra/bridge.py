"""Bridges between a picture x0 and the source x_T that it is restored from, as ordinary noising processes.

x_t = w0(t) x0 + w1(t) x_T + sd(t) n. For a given x_T, y_t = x_t - w1(t) x_T is a process with alpha = w0 and sigma = sd,
so whatever noises, jumps and samples here does so on bridges too, in y (`fewstep.networks.bridged` adds w1 x_T back for
networks that see x_t). At t = 1 both are 0: y is 0 and says nothing, a sampler leaves it by adding noise.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.algebra.process import VP, bc
from fewstep.config import NotNegative, Positive, part


@runtime_checkable
class Bridge(Protocol):
    """A `Process` whose samples stand relative to a source."""

    def source(self, t: Tensor) -> Tensor:
        """w1(t), the weight of x_T in x_t."""
        ...


class _Bridge:
    """t in [0, 1]: subclasses give w0, w1, the variance and their derivatives."""

    t_max = 1.0

    def variance(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def dvariance(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.variance(t).clamp_min(0))

    def dsigma(self, t: Tensor) -> Tensor:
        """Infinite at both ends, where the deviation rises and falls like a root."""
        return self.dvariance(t) / (2 * self.sigma(t))

    def grid(self, u: Tensor) -> Tensor:
        return u

    def level(self, t: Tensor) -> Tensor:
        return t

    def prior(self, noise: Tensor, t: Tensor) -> Tensor:
        return bc(self.sigma(t), noise) * noise


@part("process", "bridge")
class Brownian(_Bridge):
    """Brownian bridge: x_t = (1 - t) x0 + t x_T + sqrt(eps t (1 - t)) n (IBMD, arXiv 2502.01362)."""

    eps: Positive = 1.0
    """Variance of the noise; the deviation is largest, sqrt(eps) / 2, half-way."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def dalpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def source(self, t: Tensor) -> Tensor:
        return t

    def variance(self, t: Tensor) -> Tensor:
        return self.eps * t * (1 - t)

    def dvariance(self, t: Tensor) -> Tensor:
        return self.eps * (1 - 2 * t)

    def t_of_angle(self, angle: Tensor) -> Tensor:
        square = torch.tan(angle) ** 2
        return torch.where(angle >= math.pi / 2, torch.ones_like(angle), square / (square + self.eps)).clamp(0, 1)


@part("process", "i2sb")
class I2SB(_Bridge):
    """I2SB's bridge, a Brownian one of uneven clock (arXiv 2302.05872).

    With s^2 the integral of beta from 0 to t, sb^2 that from t to 1, S their sum: w0 = sb^2 / S, w1 = s^2 / S, variance
    s^2 sb^2 / S. sqrt(beta) rises linearly up to t = 1/2 and falls back; a constant beta is the Brownian bridge with
    eps = beta. The defaults are those of the released tables of 1000 steps (1e-4 to .3 / 1000), as remembered: compare
    them with the configuration of a network that you bring.
    """

    beta_start: Positive = 0.1
    """beta at both ends."""
    beta_end: NotNegative = 0.3
    """beta that the rise would reach at t = 1; it turns half-way."""

    @property
    def _root(self) -> tuple[float, float]:
        p = math.sqrt(self.beta_start)
        return p, math.sqrt(self.beta_end) - p

    def _below(self, t: Tensor) -> Tensor:
        """Integral of beta from 0 to t <= 1/2, of (p + q t)^2."""
        p, q = self._root
        return p * p * t + p * q * t**2 + q * q * t**3 / 3

    def _total(self, t: Tensor) -> Tensor:
        return 2 * self._below(torch.full_like(t, 0.5))

    def spent(self, t: Tensor) -> Tensor:
        """s^2(t); its root is the scale of what I2SB's networks predict, (x_t - x0) / s."""
        return torch.where(t <= 0.5, self._below(t), self._total(t) - self._below(1 - t))

    def _beta(self, t: Tensor) -> Tensor:
        p, q = self._root
        return (p + q * torch.minimum(t, 1 - t)) ** 2

    def alpha(self, t: Tensor) -> Tensor:
        # Not 1 - w1: what is left at the end is 0 exactly.
        return torch.where(t <= 0.5, self._total(t) - self._below(t), self._below(1 - t)) / self._total(t)

    def dalpha(self, t: Tensor) -> Tensor:
        return -self._beta(t) / self._total(t)

    def source(self, t: Tensor) -> Tensor:
        return self.spent(t) / self._total(t)

    def variance(self, t: Tensor) -> Tensor:
        return self.spent(t) * self.alpha(t)

    def dvariance(self, t: Tensor) -> Tensor:
        return self._beta(t) * (self.alpha(t) - self.source(t))

    def t_of_angle(self, angle: Tensor) -> Tensor:
        total, square = self._total(angle), torch.tan(angle) ** 2
        spent = torch.where(angle >= math.pi / 2, total, square * total / (square + total))
        near = torch.minimum(spent, total - spent)
        p, q = self._root
        # (p + q t)^3 = p^3 + 3 q s^2; without a slope s^2 is p^2 t.
        t = near / p**2 if abs(q) < 1e-9 else (torch.pow(p**3 + 3 * q * near, 1 / 3) - p) / q
        return torch.where(spent <= total / 2, t, 1 - t).clamp(0, 1)


@part("process", "ddbm")
class DDBM(_Bridge):
    """DDBM's variance-preserving bridge (arXiv 2309.16948): VP diffusion conditioned on its end.

    With R = SNR(1) / SNR(t): w1 = (alpha_t / alpha_1) R, w0 = alpha_t (1 - R), variance sigma_t^2 (1 - R).
    """

    beta_min: NotNegative = 0.1
    """beta at t = 0 (the paper's .1)."""
    beta_delta: Positive = 2.0
    """beta at t = 1 less beta at t = 0 (the paper's 2)."""

    @property
    def diffusion(self) -> VP:
        """The diffusion that is conditioned."""
        return VP(beta_min=self.beta_min, beta_delta=self.beta_delta)

    def _ratio(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(R, alpha at the end)."""
        vp, end = self.diffusion, torch.ones_like(t)
        last = vp.alpha(end)
        return (last / vp.sigma(end)) ** 2 * (vp.sigma(t) / vp.alpha(t)) ** 2, last

    def _dratio(self, t: Tensor) -> Tensor:
        vp = self.diffusion
        return 2 * self._ratio(t)[0] * (vp.dsigma(t) / vp.sigma(t) - vp.dalpha(t) / vp.alpha(t))

    def alpha(self, t: Tensor) -> Tensor:
        return self.diffusion.alpha(t) * (1 - self._ratio(t)[0])

    def dalpha(self, t: Tensor) -> Tensor:
        vp = self.diffusion
        return vp.dalpha(t) * (1 - self._ratio(t)[0]) - vp.alpha(t) * self._dratio(t)

    def source(self, t: Tensor) -> Tensor:
        ratio, last = self._ratio(t)
        return self.diffusion.alpha(t) / last * ratio

    def variance(self, t: Tensor) -> Tensor:
        return self.diffusion.sigma(t) ** 2 * (1 - self._ratio(t)[0])

    def dvariance(self, t: Tensor) -> Tensor:
        vp = self.diffusion
        return 2 * vp.sigma(t) * vp.dsigma(t) * (1 - self._ratio(t)[0]) - vp.sigma(t) ** 2 * self._dratio(t)

    def t_of_angle(self, angle: Tensor) -> Tensor:
        vp, end = self.diffusion, torch.ones_like(angle)
        last = (vp.alpha(end) / vp.sigma(end)) ** 2
        square = torch.tan(angle) ** 2
        level = torch.where(angle >= math.pi / 2, 1 / last, square / (1 + square * last))
        return vp.t_of_angle(torch.atan(torch.sqrt(level)))


def is_source(process: object, t: Tensor) -> bool:
    """Whether x_t of a bridge is its source alone at one of the times, where y is 0; never so for other processes."""
    return isinstance(process, _Bridge) and bool((t >= process.t_max).any())
