"""Which of two is better: losses that raise the likelihood of the preferred one over a reference's (arXiv 2410.03190)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.algebra.process import bc
from fewstep.objectives.regression import per_sample


def log_ratio(x: Tensor, mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2) - log N(x; reference, std^2), the mean over elements, (b,).

    x, mean, reference (b, *d), std (b,). The mean and not the sum is PSO's: its clip and beta belong to it.
    """
    return per_sample(((x - reference) ** 2 - (x - mean) ** 2) / (2 * bc(std, x) ** 2))


def pairwise(first: Tensor, second: Tensor, preference: Tensor, beta: float, clip: float | None = None) -> Tensor:
    """-log sigmoid(beta p (l_1 - l_2)), the batch mean: PSO's online loss.

    Args:
        first, second: log ratios (b,) of the two of each pair.
        preference: (b,) 1 where the first is better, -1 where the second is, 0 where they tie, which has no gradient.
        clip: c, the ratios stay in [1 - c, 1 + c] and have no gradient outside; None leaves them.
    """
    if clip is not None:
        first, second = (v.clamp(math.log1p(-clip), math.log1p(clip)) for v in (first, second))
    return -F.logsigmoid(beta * preference * (first - second)).mean()


def offline(
    win: Tensor, lose: Tensor, win_reference: Tensor, lose_reference: Tensor, beta: float, factor: float = 1.0
) -> Tensor:
    """-log sigmoid(beta [(e_w' - g e_l') - (e_w - g e_l)]) of denoising errors (b,), those of the reference with '.

    factor: g on the errors of the samples that lose.
    """
    gap = (win_reference - factor * lose_reference) - (win - factor * lose)
    return -F.logsigmoid(beta * gap).mean()


def offline_hinge(win: Tensor, lose: Tensor, beta: float, factor: float = 1.0) -> Tensor:
    """max(0, 1 + beta (e_w - g e_l)) of denoising errors (b,), the batch mean: the loss pso_db, without a reference."""
    return torch.relu(1 + beta * (win - factor * lose)).mean()
