"""Reference statistics, kept in the user's cache under a key of data, extractor and code version."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fewstep.eval.features.base import FeatureExtractor, extract
from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.eval.protocol.datasets import digits, fashion_mnist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.files import atomic_path, cache_dir

# Raised whenever the same images and network would give other numbers.
REFERENCE_VERSION = 1


@dataclass(frozen=True)
class Reference:
    """What samples are measured against: statistics, and if at hand features (N, D) and labels (N,).

    `digest` identifies it: the sha256 of a file, or the key of what it was computed from.
    """

    name: str
    statistics: FeatureStatistics
    features: Tensor | None = None
    labels: Tensor | None = None
    digest: str = ""


def digits_reference(extractor: FeatureExtractor) -> Reference:
    """The whole scikit-learn digits set (1797 images) seen by `extractor`."""
    images, labels = digits()
    return reference_of("digits-all-1797", images, labels, extractor)


def fashion_reference(extractor: FeatureExtractor, split: str = "train") -> Reference:
    """A Fashion-MNIST split (train 60,000 or test 10,000 images) seen by `extractor`."""
    images, labels = fashion_mnist(split)
    return reference_of(f"fashion-mnist-{split}", images, labels, extractor)


def reference_of(name: str, images: Tensor, labels: Tensor | None, extractor: FeatureExtractor) -> Reference:
    """Statistics and features of `images` (N, C, H, W) in [0, 255], cached by content.

    A cached file that is damaged or belongs to another key is computed again, never trusted.
    """
    key = reference_key(images, labels, extractor)
    path = cache_dir("reference") / f"{name}-{extractor.name}-{key[:16]}.safetensors"
    stored = _read(path, key)
    if stored is None:
        features = extract(extractor, images)
        stored = {"features": features}
        if labels is not None:
            stored["labels"] = labels
        with atomic_path(path) as temporary:
            save_file(stored, temporary, metadata={"key": key})
    features = stored["features"]
    statistics = FeatureStatistics(extractor.dim, provenance(name, key, extractor, len(features)))
    statistics.update(features)
    return Reference(name, statistics, features, stored.get("labels"), key)


def reference_key(images: Tensor, labels: Tensor | None, extractor: FeatureExtractor) -> str:
    """SHA-256 over the pixels, the labels, the extractor's weights and the code version."""
    digest = hashlib.sha256()
    settings = [REFERENCE_VERSION, extractor.name, extractor.dim, extractor.input_size, extractor.sha256]
    digest.update(json.dumps(settings).encode())
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
