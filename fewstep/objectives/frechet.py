"""The Frechet distance of two Gaussians with a gradient to the first one's moments."""

from __future__ import annotations

import torch
from torch import Tensor


def root(covariance: Tensor) -> Tensor:
    """The symmetric square root (d, d) of a covariance (d, d), rounded negatives taken for 0; no gradient."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def gaussian_frechet(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_root: Tensor) -> Tensor:
    """|m - m'|^2 + tr S + tr S' - 2 tr (R S R)^(1/2), R the root of S'; a scalar (FD-loss, arXiv 2604.28190).

    mean (d,), covariance (d, d), of the other one mean and symmetric root (`root`); float64 for more than a few features.
    The gradient is that of the eigenvalues of the symmetric product, which no pair of equal ones disturbs. Directions
    without variance have none: the slope of a square root at 0 is infinite. Moments that are not finite give NaN, value
    and gradient.

    >>> one = torch.eye(2, dtype=torch.float64)
    >>> fewstep.gaussian_frechet(torch.tensor([3.0, 4.0]).double(), 4 * one, torch.zeros(2).double(), one)
    tensor(27., dtype=torch.float64)
    """
    product = other_root @ covariance @ other_root
    if not bool(torch.isfinite(product.detach()).all()):
        # LAPACK raises on such a matrix, from a size on; as a loss it is an update to refuse.
        return (mean.sum() + product.sum()) * torch.nan
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    some = values > values.detach().max().clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    shared = torch.where(some, values, torch.ones_like(values)).sqrt() * some
    traces = covariance.diagonal().sum() + (other_root**2).sum()
    return ((mean - other_mean) ** 2).sum() + traces - 2 * shared.sum()
