"""Frechet distance between Gaussians fitted to features, with its sampling error and its finite-N bias.

FD = |mu - mu_r|^2 + tr S + tr S_r - 2 tr (S S_r)^(1/2)  (Dowson and Landau 1982; Heusel et al. 2017).

With S_r = L L^T the last trace is the sum of the square roots of the eigenvalues of L^T S L, which is
symmetric: no matrix square root, nothing complex, and L is computed once per reference.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike

from fewstep.eval.errors import InputError
from fewstep.eval.metrics.estimate import Estimate
from fewstep.eval.metrics.statistics import FeatureStatistics, as_features

_PAIRS = 4096


def frechet_distance(
    sample: FeatureStatistics | ArrayLike | torch.Tensor,
    reference: FeatureStatistics,
    *,
    features: ArrayLike | torch.Tensor | None = None,
) -> Estimate:
    """Frechet distance of `sample` from `reference`.

    Args:
        sample: statistics, or the features (N, D) themselves.
        reference: statistics; its root is cached, so pass the same object again.
        features: the (N, D) features behind `sample` when that is statistics. They add standard error and
            bias, and with N <= D the exact form by singular values of the N rows.

    Raises:
        ValueError: dimensions that differ, features that are not finite or not the ones of `sample`.
    """
    if not isinstance(sample, FeatureStatistics):
        if features is not None:
            raise ValueError("features: give them either as `sample` or as `features`, not both")
        features = as_features(sample)
        sample = FeatureStatistics(features.shape[1])
        sample.update(features)
    if sample.dim != reference.dim:
        raise ValueError(f"reference: dimension {reference.dim} does not match the sample's {sample.dim}")
    if features is not None:
        features = as_features(features, sample.dim)
        if len(features) != sample.n:
            raise ValueError(f"features: {len(features)} rows, but the statistics count {sample.n}")

    offset = sample.mean - reference.mean
    traces = float(np.trace(sample.covariance) + np.trace(reference.covariance))
    root = reference.root
    if features is not None and len(features) <= sample.dim:
        # tr (S S_r)^(1/2) is the nuclear norm of A L / sqrt(n - 1), A the centred features. Its zero singular
        # values are noise of 1e-16, where eigenvalues of L^T S L would give square roots of 1e-8 each.
        singular = np.linalg.svd((features - sample.mean) @ root, compute_uv=False)
        cross = float(singular.sum()) / math.sqrt(len(features) - 1)
        value = _clip(float(offset @ offset) + traces - 2 * cross, traces)
        return Estimate(value=value, n=sample.n, dim=sample.dim, reason="N too small: N <= dimension")

    product = root.T @ sample.covariance @ root
    if features is None:
        eigenvalues = np.linalg.eigvalsh(product)
        cross = _trace_of_root(eigenvalues, sample.n)
        value = _clip(float(offset @ offset) + traces - 2 * cross, traces)
        return Estimate(value=value, n=sample.n, dim=sample.dim, reason="needs the features, not only their statistics")

    eigenvalues, vectors = np.linalg.eigh(product)
    value = _clip(float(offset @ offset) + traces - 2 * _trace_of_root(eigenvalues, sample.n), traces)
    influence, curvature, bias = _sampling_error(features, sample, offset, root, eigenvalues, vectors)
    error = standard_error(influence, curvature)
    corrected = value - bias
    usable = bias <= corrected
    reason = "" if usable else f"N too small: b/N = {bias:.3g} exceeds the corrected value {corrected:.3g}"
    return Estimate(
        value=value,
        standard_error=error,
        n=sample.n,
        dim=sample.dim,
        bias=bias,
        usable=usable,
        reason=reason,
        influence=influence,
        curvature=curvature,
    )


def paired_difference(a: Estimate, b: Estimate) -> Estimate:
    """FD(a) - FD(b) when sample i of both came from the same seed: their errors largely cancel.

    Raises:
        ValueError: results without features, or of different sample counts.
    """
    if a.influence is None or b.influence is None or a.curvature is None or b.curvature is None:
        raise ValueError("a, b: both results need features for a paired difference")
    if len(a.influence) != len(b.influence):
        raise ValueError(f"a, b: {len(a.influence)} and {len(b.influence)} samples cannot be paired")
    n = len(a.influence)
    error = standard_error(a.influence - b.influence, a.curvature - b.curvature)
    return Estimate(value=a.value - b.value, standard_error=error, n=n)


def _trace_of_root(eigenvalues: np.ndarray, n: int | None) -> float:
    # A covariance of n samples has rank n - 1 at most: what lies below is noise whose square root is not.
    if n is not None and len(eigenvalues) > n - 1:
        eigenvalues = eigenvalues[len(eigenvalues) - (n - 1) :]
    return float(np.sqrt(np.clip(eigenvalues, 0.0, None)).sum())


def _clip(value: float, scale: float) -> float:
    if value < -1e-6 * scale:
        raise InputError(f"Frechet distance came out negative ({value:.3g}): covariances inconsistent")
    return max(value, 0.0)


def _sampling_error(
    features: np.ndarray,
    sample: FeatureStatistics,
    offset: np.ndarray,
    root: np.ndarray,
    eigenvalues: np.ndarray,
    vectors: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, float]:
    """First-order influence (n,), second-order influence of `_pairs` (pairs,), and bias b/n of the distance.

    With L^T S L = U diag(l) U^T, c = x - mu, y = U^T L^T c and w_ij = 1 / (sqrt(l_i l_j) (sqrt l_i + sqrt l_j)):
    the influence is 2 (mu - mu_r).c + |c|^2 - sum_i y_i^2 / sqrt(l_i) - tr S + sum_i sqrt(l_i), its second-order
    partner h(x, x') = sum_i y_i y'_i / sqrt(l_i)
    + 1/2 sum_ij w_ij (y_i y_j - d_ij l_i) (y'_i y'_j - d_ij l_i), and
    b = tr S + 1/2 sum_ij w_ij (E[y_i^2 y_j^2] - d_ij l_i^2).
    """
    n = len(features)
    keep = eigenvalues > len(eigenvalues) * np.finfo(np.float64).eps * max(eigenvalues[-1], 0.0)
    spectrum, axes = eigenvalues[keep], root @ vectors[:, keep]
    centred = features - sample.mean
    projected = centred @ axes
    squares = np.square(projected)
    roots = np.sqrt(spectrum)
    influence = (
        2 * (centred @ offset)
        + np.einsum("nd,nd->n", centred, centred)
        - squares @ (1 / roots)
        - (np.trace(sample.covariance) - roots.sum())
    )
    fourth = squares.T @ squares / n
    fourth[np.diag_indices_from(fourth)] -= spectrum**2
    weights = 1 / (np.outer(roots, roots) * (roots[:, None] + roots[None, :]))
    bias = (np.trace(sample.covariance) + 0.5 * float((fourth * weights).sum())) / n

    left, right = _pairs(n)
    products = projected[left] * projected[right]
    diagonal = spectrum * np.diagonal(weights)
    curvature = products @ (1 / roots) + 0.5 * (
        np.einsum("ki,ki->k", products @ weights, products)
        - (squares[left] + squares[right]) @ diagonal
        + spectrum @ diagonal
    )
    return influence, curvature, float(bias)


def _pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Index pairs of distinct samples; the same for equal n, so that paired results share them."""
    # Drawn, not a shift: samples ordered by class would pair within one class.
    generator = np.random.default_rng(0)
    left = generator.integers(0, n, _PAIRS)
    return left, (left + generator.integers(1, n, _PAIRS)) % n


def standard_error(influence: np.ndarray, curvature: np.ndarray) -> float:
    """Square root of var(IF)/n - 2 E[h^2]/n^2, at least 2 E[h^2]/n^2.

    Var(FD) = var(IF)/n + 2 E[h^2]/n^2 to second order at the true law, but IF is taken at the sampled one, whose noise
    adds 4 E[h^2]/n^2 to its variance: near FD = 0 the first-order error is sqrt 2 too large.
    """
    n = len(influence)
    degenerate = 2 * float(np.mean(np.square(curvature))) / n**2
    return math.sqrt(max(float(influence.var(ddof=1)) / n - degenerate, degenerate))
