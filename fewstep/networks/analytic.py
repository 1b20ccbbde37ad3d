"""Exact denoisers: a Gaussian mixture noised by any process has its posterior mean in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from fewstep.algebra.draws import Draws
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import Process, bc


class Mixture(nn.Module):
    """The exact denoiser E[x0 | x_t] of sum_k w_k N(mean_k, std_k^2 I), computed in float64.

    Args:
        process: the noising process.
        weights: (k,), normalised here.
        means: (k, d).
        stds: (k,); 0 makes a component a point.
        labels: class of each component, int (k,); a condition then restricts the mixture to its class, and a
            condition equal to max(labels) + 1 means no class.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    labels: Tensor

    def __init__(
        self,
        process: Process,
        weights: Sequence[float],
        means: Sequence[Sequence[float]],
        stds: Sequence[float],
        labels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.process = process
        w = torch.tensor(weights, dtype=torch.float64)
        self.register_buffer("weights", w / w.sum())
        self.register_buffer("means", torch.tensor(means, dtype=torch.float64))
        self.register_buffer("stds", torch.tensor(stds, dtype=torch.float64))
        self.register_buffer("labels", torch.tensor(labels if labels is not None else [0] * len(w)))
        self.classes = int(self.labels.max()) + 1

    def _logits(self, x: Tensor, t: Tensor, cond: Any) -> tuple[Tensor, Tensor, Tensor]:
        """log of weight times density of each component (b, k), its variance (b, k) and x - alpha m (b, k, d)."""
        alpha = self.process.alpha(t).double()[:, None]
        sigma = self.process.sigma(t).double()[:, None]
        var = alpha**2 * self.stds**2 + sigma**2
        gap = x.double()[:, None] - alpha[..., None] * self.means
        d = x.shape[-1]
        log_w = self.weights.log().expand(len(x), -1)
        if cond is not None:
            other = (self.labels[None] != cond[:, None]) & (cond[:, None] < self.classes)
            log_w = log_w.masked_fill(other, -math.inf)
            log_w = log_w - torch.logsumexp(log_w, 1, keepdim=True)
        logits = log_w - 0.5 * (gap**2).sum(-1) / var - 0.5 * d * torch.log(2 * math.pi * var)
        return logits, var, gap

    def log_prob(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """log p_t(x), float64 (b,)."""
        return torch.logsumexp(self._logits(x, t, cond)[0], 1)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, taps: Sequence[str] = (), **call: Any) -> Prediction:
        """x (b, d), t (b,) -> the exact Prediction in x's dtype. It has no features to tap."""
        if taps:
            raise ValueError("an analytic teacher has no features; put the discriminator on the critic")
        logits, var, gap = self._logits(x, t, cond)
        r = torch.softmax(logits, 1)
        alpha = self.process.alpha(t).double()[:, None]
        gain = alpha * self.stds**2 / var
        x0 = (r[..., None] * (self.means + gain[..., None] * gap)).sum(1)
        return from_x0(self.process, x, t, x0.to(x.dtype))

    def features(self, x: Tensor, t: Tensor, cond: Any, taps: Sequence[str]) -> Mapping[str, Tensor]:
        raise ValueError("an analytic teacher has no features; put the discriminator on the critic")

    def draw(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Exact samples: (x float32 (b, d), class int64 (b,))."""
        edges = self.weights.cumsum(0).contiguous()
        k = torch.searchsorted(edges, draws.uniform()).clamp_max(len(edges) - 1)
        noise = draws.normal(self.means.shape[1], dtype=torch.float64)
        x = self.means[k] + self.stds[k][:, None] * noise
        return x.float(), self.labels[k]


Length = Annotated[float, Gt(0), Le(1e6)]
"""A radius or a deviation in the plane; what is far larger has no float32 noise beside it."""


def gaussian(process: Process, mean: float, std: float, dim: int = 1) -> Mixture:
    """The single Gaussian N(mean, std^2 I) in `dim` dimensions."""
    return Mixture(process, [1.0], [[mean] * dim], [std])


def ring(process: Process, modes: int = 8, radius: float = 1.25, std: float = 0.1) -> Mixture:
    """A ring of Gaussians, every second one twice as heavy: dropping a mode or evening them out shows.

    Radius and weights are such that a posterior mean is about 870 (energy distance x1000) away in one step.
    """
    angles = [2 * math.pi * k / modes for k in range(modes)]
    means = [[radius * math.cos(a), radius * math.sin(a)] for a in angles]
    return Mixture(process, [1.0 + k % 2 for k in range(modes)], means, [std] * modes, list(range(modes)))


def flow_map(process: Process, mean: float, std: float, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The exact probability-flow map t -> s of N(mean, std^2 I): alpha_s m + (x - alpha_t m) rho_s / rho_t."""
    alpha_t, alpha_s = process.alpha(t), process.alpha(s)
    rho_t = torch.hypot(alpha_t * std, process.sigma(t))
    rho_s = torch.hypot(alpha_s * std, process.sigma(s))
    return bc(alpha_s * mean, x) + (x - bc(alpha_t * mean, x)) * bc(rho_s / rho_t, x)
