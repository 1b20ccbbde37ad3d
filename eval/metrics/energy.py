"""Distances between point clouds, for the toy problems: exact over all pairs, any dimension."""

from __future__ import annotations

import torch

from fewstep.eval.errors import InputError

_PAIRS_AT_ONCE = 4_000_000


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased squared energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely and Rizzo 2013).

    Exact over all pairs of distinct samples, in fp64; it may be slightly negative when the laws agree.

    Args:
        x: (N, ...) samples; trailing dimensions are flattened.
        y: (M, ...) samples of the same trailing size.

    Raises:
        ValueError: sizes that differ, fewer than two samples, or values that are not finite.
    """
    a, b = _points(x, "x"), _points(y, "y")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"x, y: points of dimension {a.shape[1]} and {b.shape[1]}")
    n, m = len(a), len(b)
    between = _sum_of_distances(a, b) / (n * m)
    within = _sum_of_distances(a, a) / (n * (n - 1)) + _sum_of_distances(b, b) / (m * (m - 1))
    return 2 * between - within


def _points(x: torch.Tensor, name: str) -> torch.Tensor:
    if x.ndim < 1 or len(x) < 2:
        raise ValueError(f"{name}: expected at least 2 samples, got shape {tuple(x.shape)}")
    points = x.detach().to(torch.float64).reshape(len(x), -1)
    if not torch.isfinite(points).all():
        raise InputError(f"{name}: values that are not finite")
    return points


def _sum_of_distances(a: torch.Tensor, b: torch.Tensor) -> float:
    rows = max(1, _PAIRS_AT_ONCE // len(b))
    # The product form of cdist loses digits between near points, which is where this distance lives.
    parts = [torch.cdist(chunk, b, compute_mode="donot_use_mm_for_euclid_dist").sum() for chunk in a.split(rows)]
    return float(torch.stack(parts).sum())
