"""Chains of points in space, such as C-alpha traces: bonds, clashes, size, handedness, and a two-sample test."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.eval.errors import InputError
from fewstep.eval.metrics.estimate import Estimate

BOND = 3.8
"""Angstrom between neighbouring C-alpha atoms of a trans peptide."""
CLASH = 3.5
"""Angstrom below which points clash that are more than two places apart."""


def lengths(x: Tensor) -> Tensor:
    """Points int64 (N,) of chains (N, n, 3): all but the rows of zeros at a chain's end, which are padding."""
    there = (x != 0).any(-1)
    places = torch.arange(1, x.shape[1] + 1, device=x.device)
    return (there * places).amax(1)


def _there(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device) < lengths(x)[:, None]


def bond_errors(x: Tensor, length: float = BOND) -> Tensor:
    """(N,) mean |distance of neighbours - length| of chains (N, n, 3), all in one unit.

    Raises:
        InputError: a chain of fewer than two points.
    """
    there = _there(x)[:, 1:]
    if not there.any(1).all():
        raise InputError("bond-error: a chain has fewer than two points")
    errors = (x.double().diff(dim=1).norm(dim=-1) - length).abs()
    return (errors * there).sum(1) / there.sum(1)


def clashing(x: Tensor, below: float = CLASH) -> Tensor:
    """(N,) 1 for a chain (N, n, 3) of which two points more than two places apart are nearer than `below`, else 0."""
    there = _there(x)
    place = torch.arange(x.shape[1], device=x.device)
    far = (place[:, None] - place).abs() > 2
    near = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist") < below
    return (near & far & there[:, :, None] & there[:, None]).flatten(1).any(1).double()


def gyration(x: Tensor) -> Tensor:
    """(N,) radius of gyration: root mean square distance of a chain's points from their mean."""
    there = _there(x)[..., None]
    count = there.sum((1, 2))
    x = x.double() * there
    middle = (x.sum(1) / count[:, None])[:, None]
    return (((x - middle) * there).square().sum((1, 2)) / count).sqrt()


def right_handed(x: Tensor) -> Tensor:
    """(N,) share of a chain's runs of four points that turn as a right-handed screw; distances alone do not tell."""
    steps = x.double().diff(dim=1)
    volume = (torch.linalg.cross(steps[:, :-2], steps[:, 1:-1]) * steps[:, 2:]).sum(-1)
    there = _there(x)[:, 3:]
    return ((volume > 0) & there).sum(1) / there.sum(1).clamp_min(1).double()


def wasserstein(a: Tensor, b: Tensor) -> float:
    """First Wasserstein distance of two sets of numbers (n,), (m,): the area between their quantile functions."""
    a, b = a.double().sort().values, b.double().sort().values
    n, m = len(a), len(b)
    cuts = torch.cat((torch.arange(1, n + 1).double() / n, torch.arange(1, m + 1).double() / m)).sort().values
    widths = torch.diff(cuts, prepend=cuts.new_zeros(1))
    middle = cuts - widths / 2
    at = [v[(middle * len(v)).floor().long().clamp(0, len(v) - 1)] for v in (a, b)]
    return float((widths * (at[0] - at[1]).abs()).sum())


def distances(x: Tensor) -> Tensor:
    """(N, n (n - 1) / 2) distances within chains, which neither turning nor moving changes; 0 beyond a chain's end."""
    there = _there(x)
    both = there[:, :, None] & there[:, None]
    inner = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist") * both
    i, j = torch.triu_indices(x.shape[1], x.shape[1], 1)
    return inner[:, i, j]


def one_nearest_neighbour(x: Tensor, y: Tensor) -> Estimate:
    """Leave-one-out accuracy of telling x (n, k) from y (m, k), n = m, by the nearest neighbour (arXiv 1610.06545).

    .5 where both are of one law; 1 where they lie apart; below .5 where x are copies of y. At a tie, as repeated copies
    have it, the share of the nearest that are of the point's own set. The error is binomial.

    Raises:
        InputError: sets of different sizes, of which the larger would be guessed, or values that are not finite.
    """
    if len(x) != len(y) or len(x) < 2:
        raise InputError(f"1-nna: needs two sets of one size, not {len(x)} and {len(y)}")
    points = torch.cat((x.double(), y.double()))
    if not torch.isfinite(points).all():
        raise InputError("1-nna: values that are not finite")
    # Not by a matrix product, whose rounding would tell copies apart.
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    apart.fill_diagonal_(math.inf)
    nearest = apart == apart.amin(1, keepdim=True)
    own = torch.arange(len(points), device=points.device) < len(x)
    share = float(((nearest & (own[:, None] == own)).sum(1) / nearest.sum(1).double()).mean())
    return Estimate(value=share, standard_error=math.sqrt(share * (1 - share) / len(points)), n=len(points))
