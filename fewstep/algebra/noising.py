"""Levels that processes share, what lies between two times, and the one function that adds noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.algebra.process import Process, bc


def angle_of(process: Process, t: Tensor) -> Tensor:
    """atan2(sigma, alpha) in [0, pi/2]: the noise level that different processes share.

    pi/2, the limit, where both are 0 at the source of a bridge.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    return torch.where((alpha == 0) & (sigma == 0), math.pi / 2, torch.atan2(sigma, alpha)).to(t.dtype)


def transition(process: Process, s: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha_{t|s}, sigma_{t|s}) of x_t = alpha_{t|s} x_s + sigma_{t|s} eps for s <= t; s = None means clean.

    Raises ValueError where s > t or alpha(s) = 0 (there is nothing to noise further).
    """
    alpha_t, sigma_t = process.alpha(t), process.sigma(t)
    if s is None:
        return alpha_t, sigma_t
    alpha_s, sigma_s = process.alpha(s), process.sigma(s)
    if bool((s > t).any()):
        raise ValueError("transition(s, t) needs s <= t in every entry")
    if bool((alpha_s == 0).any()):
        raise ValueError("transition(s, t) needs alpha(s) > 0 in every entry")
    alpha_ts = alpha_t / alpha_s
    return alpha_ts, torch.sqrt((sigma_t**2 - alpha_ts**2 * sigma_s**2).clamp_min(0))


def add_noise(process: Process, x: Tensor, eps: Tensor, t: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Noise x from time s to time t and give the unbiased regression target of a denoiser at t.

    Args:
        x: clean data when s is None, otherwise a sample at time s; (b, *d).
        eps: standard normal noise of x's shape.
        t, s: times of shape (b,) or (b, *f), s < t.

    Returns:
        (x_t, target), both of x's shape. For s = None the target is x itself. For s > 0 it is
        x_s/alpha_s - alpha_t sigma_s^2 / (alpha_s^2 sigma_{t|s}) eps, whose mean given x_t is E[x0 | x_t]
        (Tweedie for the kernel p(x_t | x_s); Phased DMD, arXiv 2510.27684). It diverges as t -> s: weigh it.

    >>> x0, eps = torch.ones(2, 1), torch.zeros(2, 1)
    >>> x_t, target = fewstep.add_noise(fewstep.Flow(), x0, eps, torch.tensor([0.25, 0.75]))
    >>> x_t.T
    tensor([[0.7500, 0.2500]])
    >>> target is x0
    True
    """
    alpha_ts, sigma_ts = transition(process, s, t)
    x_t = bc(alpha_ts, x) * x + bc(sigma_ts, x) * eps
    if s is None:
        return x_t, x
    alpha_s, sigma_s = process.alpha(s), process.sigma(s)
    gain = process.alpha(t) * sigma_s**2 / (alpha_s**2 * sigma_ts)
    return x_t, x / bc(alpha_s, x) - bc(gain, x) * eps
