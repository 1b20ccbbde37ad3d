"""A feature network behind its input size and normalisation, from a file whose digest is checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.eval.errors import InputError
from fewstep.eval.features.base import as_pixels
from fewstep.files import cache_dir, file_sha256, refuse_world_writable

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PixelNetwork(nn.Module):
    """A network behind `normalise` and a fixed input size, with the attributes of FeatureExtractor.

    `forward` takes (N, 1 or 3, input_size, input_size) in [0, 255], returns (N, dim) fp32.
    """

    def __init__(
        self,
        network: nn.Module,
        encode: Callable[[Tensor], Tensor],
        *,
        name: str,
        dim: int,
        input_size: int | None,
        sha256: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        super().__init__()
        self.network, self.encode = network, encode
        self.name, self.dim, self.input_size, self.sha256 = name, dim, input_size, sha256
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1) * 255, persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        pixels = as_pixels(images, channels=3, size=self.input_size).to(self.mean.device)
        with torch.no_grad():
            features = self.encode((pixels - self.mean) / self.std)
        if features.shape != (len(images), self.dim):
            expected = (len(images), self.dim)
            raise ValueError(f"{self.name}: features of shape {tuple(features.shape)}, expected {expected}")
        return features.float()


def find_weights(name: str, filename: str, path: str | os.PathLike[str] | None, note: str) -> Path:
    """The weights file of network `name`: `path`, or `filename` in $FEWSTEP_WEIGHTS or in the user's cache.

    Raises:
        FileNotFoundError: in none of them; the message lists where it looked and `note`.
        PermissionError: the file lies in a folder that everybody may write.
    """
    tried = [Path(path)] if path is not None else []
    if path is None:
        if folder := os.environ.get("FEWSTEP_WEIGHTS"):
            tried.append(Path(folder) / filename)
        tried.append(cache_dir("weights") / filename)
    for candidate in tried:
        if candidate.is_file():
            refuse_world_writable(candidate.parent)
            return candidate
    places = ", ".join(map(str, tried))
    raise FileNotFoundError(f"{name}: no weights at {places}. {note}")


def checked_digest(name: str, path: Path, expected: str | None) -> str:
    """The sha256 of `path`; raises ValueError when it does not begin with `expected`."""
    digest = file_sha256(path)
    if expected is not None and not digest.startswith(expected):
        raise InputError(f"{name}: {path} has sha256 {digest}, expected {expected}; truncated or another network")
    return digest
