"""Metrics of feature sets other than the Frechet distance, exact over all pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.eval.errors import InputError
from fewstep.eval.metrics.estimate import Estimate
from fewstep.eval.metrics.statistics import as_features

_ROWS = 1024


@dataclass(frozen=True)
class Manifold:
    """Precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020) for one k."""

    precision: float
    recall: float
    density: float
    coverage: float
    k: int


def class_accuracy(logits: Tensor, labels: Tensor) -> Estimate:
    """Share of samples whose arg max logit (N, K) is the label (N,) they were asked for.

    Raises:
        ValueError: shapes that do not match, labels outside 0..K-1, or logits that are not finite.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(logits):
        raise ValueError(f"logits, labels: shapes {tuple(logits.shape)} and {tuple(labels.shape)} do not match")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels: expected 0..{logits.shape[1] - 1}, got {int(labels.min())}..{int(labels.max())}")
    if not torch.isfinite(logits).all():
        raise InputError("logits: values that are not finite")
    share = float((logits.argmax(dim=1) == labels.to(logits.device)).double().mean())
    return Estimate(value=share, standard_error=math.sqrt(share * (1 - share) / len(labels)))


def mean_pairwise_distance(features: ArrayLike | Tensor) -> float:
    """Mean Euclidean distance over all pairs of distinct rows of (N, D), N >= 2."""
    points = as_features(features)
    if len(points) < 2:
        raise ValueError(f"features: a mean pairwise distance needs at least 2 rows, got {len(points)}")
    points = points - points.mean(axis=0)
    total = 0.0
    for rows in _blocks(len(points)):
        squares = _squared_distances(points[rows], points)
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = 0.0
        total += float(np.sqrt(squares).sum())
    return total / (len(points) * (len(points) - 1))


def within_class_diversity(
    features: ArrayLike | Tensor, labels: Tensor, real_features: ArrayLike | Tensor, real_labels: Tensor
) -> dict[int, float]:
    """Per class, mean pairwise feature distance over that of real data: 1 is as varied, 0 collapsed.

    Only classes among `labels` are reported. Raises ValueError when such a class has fewer than two
    samples, or when it has fewer than two real images.
    """
    fake, real = as_features(features), as_features(real_features)
    fake_labels, true_labels = labels.cpu().numpy(), real_labels.cpu().numpy()
    if len(fake) != len(fake_labels) or len(real) != len(true_labels):
        raise ValueError("labels, real_labels: one label per feature row is needed")
    ratios: dict[int, float] = {}
    for label in np.unique(fake_labels):
        mine, theirs = fake[fake_labels == label], real[true_labels == label]
        if len(mine) < 2 or len(theirs) < 2:
            raise InputError(
                f"labels: class {label} has {len(mine)} samples and {len(theirs)} real images; need 2 of each"
            )
        ratios[int(label)] = mean_pairwise_distance(mine) / mean_pairwise_distance(theirs)
    return ratios


def kernel_distance(x: ArrayLike | Tensor, y: ArrayLike | Tensor) -> Estimate:
    """Kernel distance (KID): unbiased squared MMD, kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    Exact over all pairs: no subsets, no seed. Its expectation does not depend on N, so it may be negative.
    The standard error is the delete-one jackknife over the rows of both sets.
    """
    a, b = as_features(x), as_features(y)
    dim = _same_width(a, b)
    return _mmd(a, b, lambda p, q: (p @ q.T / dim + 1) ** 3)


def gaussian_mmd(x: ArrayLike | Tensor, y: ArrayLike | Tensor, *, sigma: float, unbiased: bool = True) -> Estimate:
    """Squared MMD with the kernel exp(-|x - y|^2 / (2 sigma^2)); `unbiased=False` is the V-statistic."""
    if not sigma > 0:
        raise ValueError(f"sigma: expected a positive width, got {sigma}")
    a, b = as_features(x), as_features(y)
    _same_width(a, b)
    return _mmd(a, b, lambda p, q: np.exp(-_squared_distances(p, q) / (2 * sigma**2)), not unbiased)


def cmmd(x: ArrayLike | Tensor, y: ArrayLike | Tensor, *, unbiased: bool = False) -> Estimate:
    """CMMD of CLIP embeddings (Jayasumana et al. 2024): rows to unit length, sigma = 10, times 1000.

    The published number is the biased V-statistic, the default here; `unbiased=True` is the better estimator.

    Raises:
        ValueError: a row of zeros, which has no direction.
    """
    scaled = []
    for name, value in (("x", x), ("y", y)):
        rows = as_features(value)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if not norms.all():
            raise ValueError(f"{name}: row {int(norms.argmin())} is zero and cannot be scaled to unit length")
        scaled.append(rows / norms)
    found = gaussian_mmd(scaled[0], scaled[1], sigma=10.0, unbiased=unbiased)
    assert found.standard_error is not None
    return Estimate(value=1000 * found.value, standard_error=1000 * found.standard_error)


def manifold(real: ArrayLike | Tensor, fake: ArrayLike | Tensor, k: int = 5) -> Manifold:
    """Precision, recall, density and coverage from exact k-nearest-neighbour balls.

    Precision: share of `fake` inside some ball of `real`; recall: the reverse. Swapping the arguments swaps
    the two, which is how other packages came to print them exchanged. ADM reports k = 3, PRDC k = 5.

    Raises:
        ValueError: k below 1, or either set without k other points.
    """
    a, b = as_features(real), as_features(fake)
    _same_width(a, b)
    if not 1 <= k < min(len(a), len(b)):
        raise ValueError(f"k: expected 1 to {min(len(a), len(b)) - 1} for sets of {len(a)} and {len(b)}, got {k}")
    centre = a.mean(axis=0)
    a, b = a - centre, b - centre
    real_radius, fake_radius = _radii(a, k), _radii(b, k)
    recalled = np.zeros(len(a), dtype=bool)
    covered = np.zeros(len(a), dtype=bool)
    precise = 0
    inside = 0
    for rows in _blocks(len(b)):
        distances = _squared_distances(b[rows], a)
        within = distances <= real_radius
        precise += int(within.any(axis=1).sum())
        inside += int(within.sum())
        covered |= within.any(axis=0)
        recalled |= (distances <= fake_radius[rows, None]).any(axis=0)
    return Manifold(
        precision=precise / len(b),
        recall=float(recalled.mean()),
        density=inside / (k * len(b)),
        coverage=float(covered.mean()),
        k=k,
    )


def classifier_score(logits: Tensor, splits: int = 10) -> Estimate:
    """Inception Score of a classifier's logits (N, K): exp E KL(p(y|x) | p(y)), mean over `splits`.

    Called Inception Score only when the logits are Inception's (Salimans et al. 2016). The error is the
    standard deviation over splits divided by sqrt(splits); with one split it is NaN.
    """
    if logits.ndim != 2 or not 1 <= splits <= len(logits):
        raise ValueError(f"logits, splits: shape {tuple(logits.shape)} cannot be cut into {splits} splits")
    if not torch.isfinite(logits).all():
        raise InputError("logits: values that are not finite")
    log_p = torch.log_softmax(logits.double(), dim=1)
    scores = []
    for part in log_p.tensor_split(splits):
        log_marginal = torch.logsumexp(part, dim=0) - math.log(len(part))
        scores.append(float((part.exp() * (part - log_marginal)).sum(dim=1).mean().exp()))
    error = float(np.std(scores, ddof=1)) / math.sqrt(splits) if splits > 1 else math.nan
    return Estimate(value=float(np.mean(scores)), standard_error=error)


def _same_width(a: np.ndarray, b: np.ndarray) -> int:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of dimension {a.shape[1]} and {b.shape[1]} cannot be compared")
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"sets of {len(a)} and {len(b)} samples: need at least 2 each")
    return a.shape[1]


def _blocks(n: int) -> list[slice]:
    return [slice(start, min(start + _ROWS, n)) for start in range(0, n, _ROWS)]


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    products = a @ b.T
    squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)[None, :]
    return np.maximum(squares - 2 * products, 0.0)


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    radii = np.empty(len(points))
    for rows in _blocks(len(points)):
        distances = _squared_distances(points[rows], points)
        distances[np.arange(rows.stop - rows.start), np.arange(rows.start, rows.stop)] = np.inf
        radii[rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return radii


Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _row_sums(a: np.ndarray, kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
    """Row sums of the kernel matrix of `a` with itself, and its diagonal."""
    sums, diagonal = np.zeros(len(a)), np.zeros(len(a))
    for rows in _blocks(len(a)):
        # Only blocks on and right of the diagonal are formed; each also counts for its mirror image.
        block = kernel(a[rows], a[rows.start :])
        height = rows.stop - rows.start
        diagonal[rows] = np.diagonal(block)
        sums[rows] += block.sum(axis=1)
        sums[rows.stop :] += block[:, height:].sum(axis=0)
    return sums, diagonal


def _mmd(a: np.ndarray, b: np.ndarray, kernel: Kernel, biased: bool = False) -> Estimate:
    n, m = len(a), len(b)
    aa, aa_diagonal = _row_sums(a, kernel)
    bb, bb_diagonal = _row_sums(b, kernel)
    ab, ba = np.zeros(n), np.zeros(m)
    for rows in _blocks(n):
        block = kernel(a[rows], b)
        ab[rows] = block.sum(axis=1)
        ba += block.sum(axis=0)
    if biased:
        value = aa.sum() / n**2 + bb.sum() / m**2 - 2 * ab.sum() / (n * m)
    else:
        within_a = (aa.sum() - aa_diagonal.sum()) / (n * (n - 1))
        within_b = (bb.sum() - bb_diagonal.sum()) / (m * (m - 1))
        value = within_a + within_b - 2 * ab.sum() / (n * m)
    # Delete-one values follow from the row sums; with fewer than three rows none are defined.
    if min(n, m) < 3:
        return Estimate(value=float(value), standard_error=math.nan)
    aa, bb = aa - aa_diagonal, bb - bb_diagonal
    without_a = (aa.sum() - 2 * aa) / ((n - 1) * (n - 2)) - 2 * (ab.sum() - ab) / ((n - 1) * m)
    without_b = (bb.sum() - 2 * bb) / ((m - 1) * (m - 2)) - 2 * (ab.sum() - ba) / (n * (m - 1))
    return Estimate(value=float(value), standard_error=math.sqrt((n - 1) * without_a.var() + (m - 1) * without_b.var()))
