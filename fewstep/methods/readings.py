"""What `fewstep health` reads, from tensors that a score method has anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.prediction import Prediction
from fewstep.objectives.regression import per_sample

BINS = 4


@torch.no_grad()
def spread(x: Tensor, cond: Any = None) -> Tensor:
    """Root mean square distance of samples x (b, *d) from the mean of their class, a scalar.

    With labels (b,) it is the diversity within classes, by the unbiased variance; classes with one sample in the
    batch say nothing. Without, and where no class has two, all samples are one class: 0 is said of copies alone.
    """
    if not isinstance(cond, Tensor) or cond.ndim != 1 or cond.is_floating_point():
        cond = torch.zeros(len(x), dtype=torch.long, device=x.device)
    same = cond[:, None] == cond
    # No branch on a value: it would make the accelerator wait.
    same = (same | (same.sum() == len(x))).to(x.dtype)
    count = same.sum(1)
    apart = x.flatten(1) - same @ x.flatten(1) / count[:, None]
    several = (count > 1).to(x.dtype)
    variance = (apart**2).mean(1) * count / (count - 1).clamp_min(1)
    return ((variance * several).sum() / several.sum().clamp_min(1)).sqrt()


@torch.no_grad()
def of_batch(x: Tensor, cond: Any = None) -> dict[str, Tensor]:
    """Readings of an update's own samples x (b, *d), scalars by name.

    health/mean and health/deviation: of all their values; health/mean_error: standard error of that mean, as the samples'
    own means differ; health/spread and health/diversity: see `spread`, without and with the condition.
    """
    flat = x.flatten(1)
    each, n, more = flat.mean(1), len(x), max(1, len(x) - 1)
    return {
        "health/mean": each.mean(),
        "health/deviation": flat.std(correction=0),
        "health/mean_error": ((each - each.mean()).pow(2).sum() / more / n).sqrt(),
        "health/spread": (flat.var(0, correction=0).mean() * n / more).sqrt(),
        "health/diversity": spread(x, cond),
    }


@torch.no_grad()
def readings(
    x: Tensor, real: Prediction, gradient: Tensor, fake: Prediction | None = None, cond: Any = None
) -> dict[str, Tensor]:
    """Readings of one student update, scalars by name.

    health/contrast: root mean square of x over that of the teacher's denoiser at the least noisy quarter of
    the levels drawn, where the teacher hardly moves a healthy sample; above 1 the student is oversaturated.
    Those of `of_batch`. health/gradient_k: root mean square of the matching gradient in the k-th quarter of the angle
    atan2(sigma, alpha). health/critic_slope: slope of the regression of x on the unguided critic's D_F at these fresh
    samples, which is 1 for the posterior mean of the present student; a critic that lags behind a spreading student
    has more, behind a shrinking one less.
    """
    process, t = real.process, real.t
    angle = torch.atan2(process.sigma(t), process.alpha(t))
    clean = (angle <= angle.quantile(1 / BINS)).to(x.dtype)
    contrast = (per_sample(x**2) * clean).sum() / (per_sample(real.x0**2) * clean).sum()
    out = {"health/contrast": contrast.sqrt(), **of_batch(x, cond)}
    if fake is not None:
        out["health/critic_slope"] = (x * fake.x0).sum() / (fake.x0**2).sum()
    # No branch on a value: it would make the accelerator wait. A quarter without samples reads 0.
    quarter = (angle / (torch.pi / 2) * BINS).long().clamp(0, BINS - 1)
    size = per_sample(gradient**2).double()
    sums = torch.zeros(2, BINS, dtype=torch.float64, device=x.device).index_add_(
        1, quarter, torch.stack((size, torch.ones_like(size)))
    )
    rms = (sums[0] / sums[1].clamp_min(1)).sqrt()
    return out | {f"health/gradient_{k}": rms[k] for k in range(BINS)}
