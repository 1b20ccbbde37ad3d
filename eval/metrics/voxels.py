"""Solids of columns, voxels (N, depth, h, w) in [-1, 1] of which those above 0 are filled: holes, overlap, heights."""

from __future__ import annotations

import math

from torch import Tensor

from fewstep.eval.metrics.estimate import Estimate


def filled(x: Tensor) -> Tensor:
    """(N, depth, h, w) bool."""
    return x > 0


def heights(x: Tensor) -> Tensor:
    """Pictures (N, 1, h, w) in [-1, 1]: how many voxels of a column are filled, over the depth."""
    return 2 * filled(x).double().mean(1, keepdim=True) - 1


def holes(x: Tensor) -> Tensor:
    """(N,) share of a solid's filled voxels that stand on an empty one; 0 of columns that stand on the ground."""
    full = filled(x)
    hanging = (full[:, 1:] & ~full[:, :-1]).flatten(1).sum(1)
    return hanging / full.flatten(1).sum(1).clamp_min(1)


def nearest_overlap(x: Tensor, real: Tensor) -> Estimate:
    """Mean over samples of the largest intersection over union with a real solid (M, depth, h, w).

    High alone says little: a copy of one training shape has 1.
    """
    a, b = (filled(v).flatten(1).float() for v in (x, real))
    common = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1) - common
    best = (common / union.clamp_min(1)).amax(1).double()
    error = float(best.std()) / math.sqrt(len(best)) if len(best) > 1 else math.nan
    return Estimate(value=float(best.mean()), standard_error=error, n=len(best))
