"""Samples of points (n, d), of which some may be padding: their frame, and means over the points that are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def points_of(cond: Any) -> Tensor | None:
    """cond["points"] (b, n), 1 for a point that is there; None where all are."""
    return cond.get("points") if isinstance(cond, Mapping) else None


def padded(x: Tensor, points: Tensor | None) -> Tensor:
    """x (b, n, d) with zeros where points (b, n) has none, whatever stood there."""
    # By selection: 0 times infinity is no zero.
    return x if points is None else torch.where(points[..., None] > 0, x, torch.zeros_like(x))


def centred(x: Tensor, points: Tensor | None = None) -> Tensor:
    """x (b, n, d) less the mean of each sample's points, zeros at padding (b, n).

    Of standard normal noise: covariance I - 1/n between the points of a sample, independent of their mean (the frame
    of arXiv 2203.02923, in which translation does not count).
    """
    if points is None:
        return x - x.mean(1, keepdim=True)
    x = padded(x, points)
    count = (points > 0).sum(1).clamp_min(1).to(x.dtype)
    return padded(x - (x.sum(1) / count[:, None])[:, None], points)


def fill_of(cond: Any) -> Tensor | None:
    """(b,) by which a mean over all n points, zero at padding, becomes one over those that are there; None for 1."""
    points = points_of(cond)
    return None if points is None else points.shape[1] / (points > 0).sum(1).clamp_min(1).double()


def over_points(weight: Tensor, cond: Any) -> Tensor:
    """weight (b,) of means over all points times `fill_of`."""
    fill = fill_of(cond)
    return weight if fill is None else weight * fill.to(weight)
