"""The Gaussian and the mixture on which fitted samplers have golden numbers."""

from __future__ import annotations

import torch
from torch import Tensor

M, S = 0.7, 0.4
MIXTURE = ([0.3, 0.7], [[-1.2], [0.8]], [0.25, 0.35])
"""Weights, means and deviations."""


def quantiles(count: int) -> Tensor:
    """(count, 1) of the standard normal, float64."""
    return (torch.erfinv(2 * ((torch.arange(count, dtype=torch.float64) + 0.5) / count) - 1) * 2**0.5)[:, None]
