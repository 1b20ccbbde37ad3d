"""Mean and covariance of features: streaming, fp64, mergeable over batches, shards and processes."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from fewstep.config import UserError
from fewstep.eval.errors import InputError
from fewstep.files import atomic_path, parse_json


class FeatureStatistics:
    """Mean and covariance (divisor n - 1) of (N, D) features, accumulated in fp64.

    Sums are taken about a pilot mean (that of the first batch), so features with a large common offset lose
    no digits to cancellation. Two accumulators merge exactly up to fp64 rounding, in any order.

    `provenance` is a JSON mapping that travels with the file. Statistics read from a file that states no
    count have ``n = None``: they can be compared against, not added to.
    """

    def __init__(self, dim: int, provenance: Mapping[str, Any] | None = None):
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        self.dim = int(dim)
        self.provenance: dict[str, Any] = dict(provenance or {})
        self._n: int | None = 0
        self._pilot: np.ndarray | None = None
        self._sum = np.zeros(dim)
        self._outer = np.zeros((dim, dim))
        self._root: np.ndarray | None = None
        self._moments: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def from_moments(
        cls,
        mean: ArrayLike,
        covariance: ArrayLike,
        n: int | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> FeatureStatistics:
        """Statistics with the given mean (D,) and covariance (D, D), e.g. of a published reference.

        Raises:
            ValueError: shapes that do not belong together, values that are not finite, or a covariance that
                is not symmetric or has a clearly negative variance.
        """
        mean = np.asarray(mean, dtype=np.float64)
        covariance = np.asarray(covariance, dtype=np.float64)
        if mean.ndim != 1:
            raise ValueError(f"mean: expected shape (D,), got {mean.shape}")
        if covariance.shape != (mean.size, mean.size):
            raise ValueError(f"covariance: expected shape {(mean.size, mean.size)}, got {covariance.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("mean, covariance: values that are not finite")
        scale = np.abs(covariance).max(initial=0.0)
        if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-5 * scale:
            raise ValueError("covariance: not symmetric")
        if np.diagonal(covariance).min() < -1e-6 * scale:
            raise ValueError("covariance: negative variance on the diagonal")
        if n is not None and n < 2:
            raise ValueError(f"n: expected at least 2 samples, got {n}")
        stats = cls(mean.size, provenance)
        covariance = (covariance + covariance.T) / 2
        stats._n, stats._pilot, stats._moments = n, mean, (mean, covariance)
        stats._outer = covariance * ((n or 1) - 1)
        return stats

    @property
    def n(self) -> int | None:
        """Number of samples seen; None when read from a file that does not state it."""
        return self._n

    @property
    def mean(self) -> np.ndarray:
        """(D,) fp64."""
        return self._finished()[0]

    @property
    def covariance(self) -> np.ndarray:
        """(D, D) fp64, divisor n - 1."""
        return self._finished()[1]

    @property
    def root(self) -> np.ndarray:
        """L with L L^T = covariance, shape (D, rank), cached: the costly half of a Frechet distance.

        L = V sqrt(w) of the symmetric eigendecomposition; directions whose eigenvalue is rounding noise are
        left out, and no more than n - 1 are kept.
        """
        if self._root is None:
            values, vectors = np.linalg.eigh(self.covariance)
            if values[0] < -1e-4 * max(values[-1], 0.0):
                raise ValueError(
                    f"covariance: not positive semi-definite (smallest eigenvalue {values[0]:.3g}, "
                    f"largest {values[-1]:.3g})"
                )
            keep = values > self.dim * np.finfo(np.float64).eps * max(values[-1], 0.0)
            if self._n is not None:
                keep[: max(0, self.dim - (self._n - 1))] = False
            self._root = np.ascontiguousarray(vectors[:, keep] * np.sqrt(values[keep]))
        return self._root

    def update(self, features: ArrayLike | torch.Tensor) -> None:
        """Add a batch of features of shape (N, D), any floating type, any device.

        Raises:
            ValueError: another shape than (N, D), or a value that is not finite; nothing is added then.
        """
        if self._n is None:
            raise ValueError("cannot update statistics of unknown sample count (n is None)")
        batch = as_features(features, self.dim)
        if not len(batch):
            return
        if self._pilot is None:
            self._pilot = batch.mean(axis=0)
        shifted = batch - self._pilot
        self._sum += shifted.sum(axis=0)
        # numpy hands X^T X to BLAS syrk, which does half the work of a general product.
        self._outer += shifted.T @ shifted
        self._n += len(batch)
        self._root = self._moments = None

    def merge(self, other: FeatureStatistics) -> None:
        """Add another accumulator's samples to this one.

        Raises:
            ValueError: another dimension, or an unknown sample count on either side.
        """
        if other.dim != self.dim:
            raise ValueError(f"other: dimension {other.dim} does not match {self.dim}")
        if self._n is None or other._n is None:
            raise ValueError("cannot merge statistics of unknown sample count (n is None)")
        if other._pilot is None:
            return
        if self._pilot is None:
            self._pilot = other._pilot.copy()
        delta = other._pilot - self._pilot
        cross = np.outer(other._sum, delta)
        self._outer += other._outer + cross + cross.T + other._n * np.outer(delta, delta)
        self._sum += other._sum + other._n * delta
        self._n += other._n
        self._root = self._moments = None

    def save(self, path: str | os.PathLike[str], features: np.ndarray | None = None) -> Path:
        """Write an npz with ``mu``, ``sigma`` (clean-fid's keys), ``n`` (-1 when unknown), ``provenance``.

        With `features` (N, D), those of the samples seen, KID and precision can be measured against the file too. The
        file appears whole or not at all.
        """
        target = Path(path)
        if target.suffix != ".npz":
            raise ValueError(f"path: expected a name ending in .npz, got {target.name!r}")
        mean, covariance = self._finished()
        text = json.dumps(self.provenance, sort_keys=True, ensure_ascii=False)
        count = -1 if self._n is None else self._n
        with atomic_path(target) as temporary:
            kept = {} if features is None else {"features": features.astype(np.float32)}
            np.savez(temporary, mu=mean, sigma=covariance, n=np.int64(count), provenance=np.array(text), **kept)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureStatistics:
        """Read an npz with keys ``mu`` and ``sigma``: ours, or one by clean-fid, pytorch-fid, EDM or ADM.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a pickle, a damaged archive, missing keys, or moments that make no sense.
        """
        source = Path(path)
        arrays = read_npz(source, required=("mu", "sigma"), optional=("n", "provenance"))
        try:
            n = int(arrays["n"]) if "n" in arrays else -1
            provenance = parse_json(str(arrays["provenance"]), "provenance") if "provenance" in arrays else {}
            return cls.from_moments(arrays["mu"], arrays["sigma"], n if n >= 0 else None, provenance)
        except (ValueError, TypeError, UserError) as error:
            raise InputError(f"{source}: {error}") from None

    def _finished(self) -> tuple[np.ndarray, np.ndarray]:
        if self._moments is None:
            if self._pilot is None or self._n is None or self._n < 2:
                raise ValueError(f"mean, covariance: need at least 2 samples, have {self._n}")
            shift = self._sum / self._n
            covariance = (self._outer - np.outer(self._sum, shift)) / (self._n - 1)
            self._moments = (self._pilot + shift, (covariance + covariance.T) / 2)
        return self._moments


def as_features(features: ArrayLike | torch.Tensor, dim: int | None = None) -> np.ndarray:
    """`features` as a finite fp64 (N, D) array.

    Raises:
        ValueError: another rank, another D than `dim`, or values that are not finite (the first row is
        named).
    """
    if isinstance(features, torch.Tensor):
        features = features.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2 or (dim is not None and array.shape[1] != dim):
        raise ValueError(f"features: expected shape (N, {'D' if dim is None else dim}), got {array.shape}")
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise InputError(
            f"features: {int(bad.sum())} of {len(array)} rows hold NaN or infinity, first row {bad.argmax()}"
        )
    return array


def read_npz(
    path: str | os.PathLike[str], required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """The named arrays of an npz file, never unpickling anything.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an npz, a damaged one, object arrays inside, or a required key missing.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such statistics file")
    if not zipfile.is_zipfile(source):
        with open(source, "rb") as handle:
            looks_pickled = source.suffix in {".pkl", ".pickle"} or handle.read(1) == b"\x80"
        if looks_pickled:
            raise InputError(
                f"{source}: a pickle can run any code when loaded and is refused; convert a published one "
                f"with `python -m fewstep.eval.tools.convert {source} {source.with_suffix('.npz')}`"
            )
        raise InputError(f"{source}: not an npz archive (or truncated)")
    try:
        with np.load(source, allow_pickle=False) as archive:
            if missing := [key for key in required if key not in archive]:
                raise KeyError(f"missing {missing}, has {sorted(archive.files)}")
            return {key: archive[key] for key in (*required, *optional) if key in archive}
    except KeyError as error:
        raise InputError(f"{source}: {error.args[0]}") from None
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise InputError(f"{source}: damaged npz archive ({error})") from None
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
