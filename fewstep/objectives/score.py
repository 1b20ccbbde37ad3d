"""Score differences: the gradient of distribution matching and how it reaches the student."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.prediction import Prediction


def score_difference(fake: Prediction, real: Prediction) -> Tensor:
    """D_fake - D_real, (b, *d). Times alpha^2/sigma^2 it is d KL(q_t || p_t) / dx0 (DMD, arXiv 2311.18828, eq. 7)."""
    return fake.x0 - real.x0


def dmd_normalizer(x: Tensor, real: Tensor, floor: float = 1e-6) -> Tensor:
    """1 / <|x - D_real|>, the per-sample mean over all other axes, shape (b, 1, ...) (DMD, eq. 8).

    Never over the batch: one bad sample would then set the step of all. `floor` keeps it finite at x = D_real.
    """
    spread = (x - real).abs().flatten(1).mean(1).clamp_min(floor)
    return (1 / spread).reshape(-1, *(1,) * (x.ndim - 1))


def toward(x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient with respect to x is gradient / numel(x); its value is mean(gradient^2) / 2.

    Non-finite entries of the gradient count as 0 (as in DMD2's public training code).
    """
    gradient = torch.nan_to_num(gradient.detach(), nan=0.0, posinf=0.0, neginf=0.0)
    return 0.5 * ((x - (x - gradient).detach()) ** 2).mean()
