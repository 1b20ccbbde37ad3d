"""Reference statistics, kept in the user's cache under a key of data, extractor and code version."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.eval.errors import InputError
from fewstep.eval.features.base import FeatureExtractor, extract
from fewstep.eval.metrics.statistics import FeatureStatistics, read_npz
from fewstep.eval.protocol.datasets import digits, fashion_mnist
from fewstep.eval.protocol.images import to_pixels
from fewstep.eval.protocol.preset import Preset, locate
from fewstep.eval.protocol.real import RealPictures
from fewstep.eval.protocol.resize import CHAINED, Step, apply_chain
from fewstep.files import atomic_path, cache_dir, file_sha256

# Raised whenever the same images and network would give other numbers.
REFERENCE_VERSION = 1
Source = Callable[[], tuple[Tensor, Tensor | None] | RealPictures | Path]
"""Opens what samples are compared with, when it is asked for."""


@dataclass(frozen=True)
class Reference:
    """What samples are measured against: statistics, and if at hand features (N, D) and labels (N,).

    `digest` identifies it: the sha256 of a file, or the key of what it was computed from. `about` says what it is of.
    """

    name: str
    statistics: FeatureStatistics
    features: Tensor | None = None
    labels: Tensor | None = None
    digest: str = ""
    about: str = ""


def digits_reference(extractor: FeatureExtractor) -> Reference:
    """The whole scikit-learn digits set (1797 images) seen by `extractor`."""
    images, labels = digits()
    return reference_of("digits-all-1797", images, labels, extractor)


def fashion_reference(extractor: FeatureExtractor, split: str = "train") -> Reference:
    """A Fashion-MNIST split (train 60,000 or test 10,000 images) seen by `extractor`."""
    images, labels = fashion_mnist(split)
    return reference_of(f"fashion-mnist-{split}", images, labels, extractor)


def preset_reference(
    preset: Preset,
    extractor: FeatureExtractor,
    data: Source | None = None,
) -> Reference:
    """The reference a preset names, checked against the extractor.

    Args:
        data: what a preset of kind ``data`` or ``against`` compares with: pictures, a statistics file, or all samples of
            a run's data, in [-1, 1] where they are images, and their classes or None.

    Raises:
        MissingFiles: files the user must supply; ValueError: a reference of another dimension or extractor, or no data.
    """
    builtin = {
        "digits": digits_reference,
        "fashion-mnist-train": lambda e: fashion_reference(e, "train"),
        "fashion-mnist-test": lambda e: fashion_reference(e, "test"),
    }
    wanted = preset.reference
    if wanted.kind == "none":
        raise InputError(f"preset {preset.name}: only exports images, it has no reference")
    if wanted.kind in ("data", "against"):
        if data is None:
            raise InputError(
                f"preset {preset.name}: compares with a run's data; nothing here says which these are, so give "
                "--against FOLDER or FILE.npz"
            )
        found = data()
        if isinstance(found, RealPictures):
            return real_reference(found, extractor, preset.steps)
        if isinstance(found, Path):
            return file_reference(found.name, found, extractor)
        real, labels = found
        if preset.vectors:
            real = real[: max(preset.number, wanted.images or 0)].flatten(1)
            return vector_reference(wanted.name, real, extractor)
        return reference_of(wanted.name, to_pixels(real), labels, extractor, preset.steps)
    if wanted.kind == "builtin":
        if wanted.name not in builtin:
            raise InputError(f"reference.name: unknown {wanted.name!r}, expected one of {sorted(builtin)}")
        return builtin[wanted.name](extractor)
    assert wanted.file is not None  # a Preset checks it
    path = locate(wanted.file, "reference")
    return file_reference(wanted.name, path, extractor)


def file_reference(name: str, path: Path, extractor: FeatureExtractor) -> Reference:
    """The statistics of a file, and its features where it keeps them.

    Raises:
        FileNotFoundError, ValueError: no statistics file, or one of another extractor.
    """
    statistics = FeatureStatistics.load(path)
    if statistics.dim != extractor.dim:
        raise InputError(f"{path}: dimension {statistics.dim}, but {extractor.name} gives {extractor.dim}")
    made_with = statistics.provenance.get("extractor_sha256")
    if made_with is not None and made_with != extractor.sha256:
        raise InputError(f"{path}: made with another extractor ({statistics.provenance.get('extractor')})")
    features = read_npz(path, (), ("features",)).get("features")
    if features is not None and features.shape != (statistics.n, statistics.dim):
        raise InputError(f"{path}: features of shape {features.shape}, expected {(statistics.n, statistics.dim)}")
    kept = None if features is None else torch.from_numpy(features).float()
    count = "an unknown number of" if statistics.n is None else f"{statistics.n:,}"
    return Reference(name, statistics, kept, digest=file_sha256(path), about=f"{path.name}, {count} pictures")


def real_reference(real: RealPictures, extractor: FeatureExtractor, chain: Sequence[Step] = ()) -> Reference:
    """Statistics and features of pictures that are read one by one, cached under a digest of their contents."""
    rows = real.rows()
    key = hashlib.sha256(json.dumps([*_settings(extractor, chain), real.digest(rows)]).encode()).hexdigest()
    stem = f"{re.sub(r'[^A-Za-z0-9._-]', '_', real.name)}-{extractor.name.replace(':', '-')}"
    parts = (real.read(rows[i : i + CHAINED]) for i in range(0, len(rows), CHAINED))
    features = _cached(stem, key, extractor, chain, parts, None)["features"]
    statistics = _statistics(real.name, key, extractor, features)
    labels = None if real.labels is None else real.labels[torch.tensor(rows)]
    used = f"{len(rows):,}" if len(rows) == real.count else f"{len(rows):,} of {real.count:,}"
    return Reference(real.name, statistics, features, labels, key, f"{real.about}, {used} pictures")


def vector_reference(name: str, vectors: Tensor, extractor: FeatureExtractor) -> Reference:
    """Vectors (N, D) as they are."""
    key = reference_key(vectors, None, extractor)
    statistics = _statistics(name, key, extractor, vectors)
    return Reference(name, statistics, vectors, digest=key, about=f"{name}, {len(vectors):,} vectors")


def reference_of(
    name: str,
    images: Tensor,
    labels: Tensor | None,
    extractor: FeatureExtractor,
    chain: Sequence[Step] = (),
) -> Reference:
    """Statistics and features of `images` (N, C, H, W) in [0, 255] behind a resize chain, cached by content.

    A cached file that is damaged or belongs to another key is computed again, never trusted.
    """
    key = reference_key(images, labels, extractor, chain)
    parts = images.split(256 if not chain else CHAINED)
    stored = _cached(f"{name}-{extractor.name}", key, extractor, chain, parts, labels)
    features = stored["features"]
    statistics = _statistics(name, key, extractor, features)
    return Reference(name, statistics, features, stored.get("labels"), key, f"{name}, {len(features):,} pictures")


def _cached(
    stem: str,
    key: str,
    extractor: FeatureExtractor,
    chain: Sequence[Step],
    parts: Iterable[Tensor],
    labels: Tensor | None,
) -> dict[str, Tensor]:
    """Features of images that come in parts, with their labels: from the user's cache, or computed and put there."""
    path = cache_dir("reference") / f"{stem}-{key[:16]}.safetensors"
    stored = _read(path, key)
    if stored is None:
        stored = {"features": extract(extractor, (apply_chain(part, chain) for part in parts))}
        if labels is not None:
            stored["labels"] = labels
        with atomic_path(path) as temporary:
            save_file(stored, temporary, metadata={"key": key})
    return stored


def _statistics(name: str, key: str, extractor: FeatureExtractor, features: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1], provenance(name, key, extractor, len(features)))
    statistics.update(features)
    return statistics


def _settings(extractor: FeatureExtractor, chain: Sequence[Step]) -> list[Any]:
    """What features depend on beside the images."""
    settings = [REFERENCE_VERSION, extractor.name, extractor.dim, extractor.input_size, extractor.sha256]
    return settings + [[step.op, step.size] for step in chain]


def reference_key(images: Tensor, labels: Tensor | None, extractor: FeatureExtractor, chain: Sequence[Step] = ()) -> str:
    """SHA-256 over the pixels, the labels, the resize chain, the extractor's weights and the code version."""
    digest = hashlib.sha256()
    digest.update(json.dumps(_settings(extractor, chain)).encode())
    for tensor in (images, labels):
        if tensor is not None:
            digest.update(f"{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()


def provenance(name: str, key: str, extractor: FeatureExtractor, n: int) -> dict[str, object]:
    """What a statistics file says about its origin."""
    return {
        "reference": name,
        "key": key,
        "n": n,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "input_size": extractor.input_size,
        "version": REFERENCE_VERSION,
        "torch": torch.__version__,
    }


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as archive:
            if (archive.metadata() or {}).get("key") != key:
                return None
            return {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    except Exception:
        # safetensors raises its own error types on truncation; whatever it is, the file can be made again.
        return None
