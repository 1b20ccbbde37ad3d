"""Regression losses: per-sample means over all axes but the first, then the batch mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fewstep.algebra.noising import add_noise, transition
from fewstep.algebra.points import over_points
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import EDM, Process

Weight = Literal["x0", "eps", "v", "velocity", "psi", "edm", "snr_truncated"]


def per_sample(x: Tensor) -> Tensor:
    """Mean over every axis but the first: (b, *d) -> (b,).

    >>> fewstep.per_sample(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    tensor([2., 0.])
    """
    return x.flatten(1).mean(1) if x.ndim > 1 else x


def mse(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over the batch of weight (b,) times the per-sample mean of (a - b)^2, both (b, *d); a scalar.

    >>> a, b = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.zeros(2, 2)
    >>> fewstep.mse(a, b), fewstep.mse(a, b, weight=torch.tensor([2.0, 1.0]))
    (tensor(2.5000), tensor(5.))
    """
    error = per_sample((a - b) ** 2)
    return (error if weight is None else error * weight.to(error.dtype)).mean()


def pseudo_huber_element(a: Tensor, b: Tensor, c: float) -> Tensor:
    """mean(sqrt((a - b)^2 + c^2) - c) over every element of a and b (b, *d) (LCM, arXiv 2310.04378); a scalar.

    >>> fewstep.pseudo_huber_element(torch.tensor([[3.0]]), torch.tensor([[0.0]]), c=4.0)
    tensor(1.)
    """
    return (torch.sqrt((a - b) ** 2 + c**2) - c).mean()


def pseudo_huber_sample(a: Tensor, b: Tensor, c: float) -> Tensor:
    """mean_b(sqrt(|a - b|^2 + c^2) - c) on the L2 norm of a sample of d elements, a and b (b, *d); a scalar.

    iCT, arXiv 2310.14189, with c = 0.00054 sqrt(d).

    >>> fewstep.pseudo_huber_sample(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), c=12.0)
    tensor(1.)
    """
    squared = ((a - b) ** 2).flatten(1).sum(1)
    return (torch.sqrt(squared + c**2) - c).mean()


def x0_weight(
    kind: Weight,
    process: Process,
    t: Tensor,
    sigma_data: float = 0.5,
    s: Tensor | None = None,
    clamp: float = 10.0,
) -> Tensor:
    """Weight (b,) of an x0 error at time t.

    x0: 1. eps: SNR = alpha^2/sigma^2, the plain eps loss. v: SNR + 1 (arXiv 2202.00512, sec. 4), which is the plain
    v loss where alpha^2 + sigma^2 = 1; elsewhere the v error is larger, (alpha^2 + sigma^2)(SNR + 1).
    velocity: the plain loss on dx/dt = alpha' x0 + sigma' eps, 1/sigma^2 for flow (Wan, Flux and Qwen-Image are trained
    so, and their critics in FastGen). psi: Phased DMD's sigma_{t|s}^2 min(1/sigma_{t|s}^2, clamp) on the error of
    eps - x0 (arXiv 2510.27684), samples being at time s (None: clean, sigma_{t|s} = sigma_t).
    edm: (sigma^2 + sigma_d^2)/(sigma sigma_d)^2 (arXiv 2206.00364, table 1). snr_truncated: max(SNR, 1)
    (arXiv 2202.00512, eq. 9).

    >>> t = torch.tensor([0.25])
    >>> fewstep.x0_weight("eps", fewstep.Flow(), t), fewstep.x0_weight("velocity", fewstep.Flow(), t)
    (tensor([9.]), tensor([16.]))
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    if kind == "x0":
        return torch.ones_like(t)
    if kind == "eps":
        return alpha**2 / sigma**2
    if kind == "v":
        return (alpha**2 + sigma**2) / sigma**2
    if kind == "velocity":
        return (process.dalpha(t) - process.dsigma(t) * alpha / sigma) ** 2
    if kind == "psi":
        # At one x_t the error of eps - x0 is (alpha / sigma + 1) times that of x0.
        between = transition(process, s, t)[1] ** 2
        return ((alpha + sigma) / sigma) ** 2 * between * (1 / between).clamp_max(clamp)
    if kind == "edm":
        data = process.sigma_data if isinstance(process, EDM) else sigma_data
        # The published quotient multiplied out, so that pure noise (alpha = 0) has its limit 1 / sigma_d^2.
        return alpha**2 / sigma**2 + 1 / data**2
    if kind == "snr_truncated":
        return (alpha**2 / sigma**2).clamp_min(1)
    raise ValueError(f"weight {kind!r} is not one of {', '.join(get_args(Weight))}")


def dsm(
    denoiser: Callable[..., Prediction],
    x: Tensor,
    t: Tensor,
    eps: Tensor,
    cond: Any = None,
    *,
    weight: Weight | None = None,
    s: Tensor | None = None,
    clamp: float = 10.0,
    **call: Any,
) -> Tensor:
    """Denoising score matching (arXiv 2206.00364, eq. 2) of a denoiser on samples x at time s, noised to t; a scalar.

    Args:
        x, eps: samples at time s (None: clean) and standard normal noise, both (b, *d).
        t, s: times of shape (b,), s < t.
        weight, clamp: see `x0_weight`.
        cond, call: what the denoiser is told beside x and t; where it has points, the mean is over those that are there.

    Without a weight it is x0 from clean samples and psi from s > 0: there the target is the unbiased sub-interval one
    of `add_noise`, whose second moment diverges as t -> s, and of the weights only psi, with its `clamp`, takes that
    back (arXiv 2510.27684). The others want t kept away from s.

    >>> exact = fewstep.load("toy/dmd2").data.open().mixture
    >>> x, label = exact.draw(fewstep.Draws(fewstep.fold("dsm"), torch.arange(256)))
    >>> eps, t = torch.zeros_like(x), torch.full((256,), 0.02)
    >>> fewstep.dsm(exact, x, t, eps).item() < 1e-2  # next to the data there is little to take off
    True
    """
    process: Process = denoiser.process  # type: ignore[attr-defined]
    x_t, target = add_noise(process, x, eps, t, s)
    prediction = denoiser(x_t, t, cond, **call)
    kind: Weight = weight or ("x0" if s is None else "psi")
    return mse(prediction.x0, target, over_points(x0_weight(kind, process, t, s=s, clamp=clamp), cond))


def moment_divergence(x: Tensor, mean: float, variance: float) -> Tensor:
    """Mean over a batch (b, *d) of KL(N(m_i, v_i) || N(mean, variance)), m_i and v_i the moments of a sample's elements.

    A regulariser without parameters that holds brightness and contrast (Decoupled DMD, arXiv 2511.22677).

    >>> fewstep.moment_divergence(torch.tensor([[-1.0, 1.0]]), mean=0.0, variance=1.0)
    tensor(0.)
    """
    flat = x.flatten(1)
    v = flat.var(1, unbiased=False).clamp_min(1e-8)
    return (0.5 * ((v + (flat.mean(1) - mean) ** 2) / variance - 1 - torch.log(v / variance))).mean()
