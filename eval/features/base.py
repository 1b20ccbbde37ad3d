"""Feature extractors: images in, one fp32 row per image out.

An extractor is also a valid ``custom_feat_extractor`` of clean-fid, and the other way round (`wrap`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fewstep.eval.errors import InputError


@runtime_checkable
class FeatureExtractor(Protocol):
    """What a metric needs to know about a feature network.

    Attributes:
        name: short name, printed beside every number.
        dim: feature dimension D.
        input_size: side of the square images it takes, in pixels; None when any size will do.
        sha256: digest of the weights (64 hex digits), part of every cache key.
    """

    name: str
    dim: int
    input_size: int | None
    sha256: str

    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 or floating images in [0, 255] -> (N, D) fp32 features."""
        ...


def as_pixels(images: Tensor, channels: int | None = None, size: int | None = None) -> Tensor:
    """Images as fp32 in [0, 255] with the channel count and size asked for.

    Three channels are averaged to one and one is repeated to three; nothing is resized here.
    A gradient goes through: callers that want none say so.

    Raises:
        ValueError: another rank, channel count or size, values outside [0, 255], or not finite.
    """
    if images.ndim != 4:
        raise ValueError(f"images: expected shape (N, C, H, W), got {tuple(images.shape)}")
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected 1 or 3 channels, got {images.shape[1]}")
    if size is not None and images.shape[2:] != (size, size):
        height, width = images.shape[2:]
        raise ValueError(f"images: expected {size}x{size} pixels, got {height}x{width}; resize them first")
    pixels = images.float()
    if len(pixels):
        low, high = pixels.detach().aminmax()
        # aminmax carries NaN through, and a comparison with NaN is false.
        if not (low >= 0 and high <= 255):
            raise ValueError(f"images: expected values in [0, 255], got {float(low):.4g} to {float(high):.4g}")
    if channels is None or channels == images.shape[1]:
        return pixels
    return pixels.mean(dim=1, keepdim=True) if channels == 1 else pixels.expand(-1, 3, -1, -1)


def state_sha256(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Vectors:
    """Samples that are no images, as they are: (N, D) -> (N, D); `dim` 0 stands for any."""

    name, dim, input_size = "vectors", 0, None
    sha256 = hashlib.sha256(b"vectors").hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        return images


class RandomConv(nn.Module):
    """A seeded, untrained convolutional network: for tests of the plumbing, meaningless as a metric."""

    input_size: int | None = None

    def __init__(self, seed: int = 0, dim: int = 32):
        super().__init__()
        self.name, self.dim = f"random-conv-{seed}-{dim}", dim
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, dim, 3, padding=1)
        with torch.no_grad():
            for layer in (self.first, self.second):
                fan_in = layer.weight[0].numel()
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / fan_in**0.5)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.1)
        self.requires_grad_(False).eval()
        self.sha256 = state_sha256(self)

    def forward(self, images: Tensor) -> Tensor:
        pixels = as_pixels(images, channels=3).to(self.first.weight.device) / 127.5 - 1
        hidden = nn.functional.silu(self.first(pixels))
        return nn.functional.silu(self.second(hidden)).mean(dim=(2, 3))


def random_conv(seed: int = 0, dim: int = 32) -> RandomConv:
    """Untrained network with weights from `seed` alone; any image size, 1 or 3 channels."""
    return RandomConv(seed, dim)


class Wrapped(nn.Module):
    """A bare callable (such as a clean-fid extractor) with the attributes of the protocol."""

    def __init__(self, function: Callable[[Tensor], Tensor], name: str, dim: int, input_size: int | None, sha256: str):
        super().__init__()
        self.function = function
        self.name, self.dim, self.input_size, self.sha256 = name, dim, input_size, sha256

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.function(as_pixels(images, channels=3, size=self.input_size))
        if features.shape != (len(images), self.dim):
            expected = (len(images), self.dim)
            raise ValueError(f"{self.name}: features of shape {tuple(features.shape)}, expected {expected}")
        return features.float()


def wrap(function: Callable[[Tensor], Tensor], *, name: str, dim: int, input_size: int | None, sha256: str) -> Wrapped:
    """Make a FeatureExtractor of any callable fp32 (N, 3, H, W) in [0, 255] -> (N, D).

    `sha256` identifies the weights behind it; features of unknown weights cannot be cached or compared.
    """
    if len(sha256) != 64:
        raise ValueError(f"sha256: expected 64 hex digits identifying the weights, got {sha256!r}")
    return Wrapped(function, name, dim, input_size, sha256)


def rows_at_once(extractor: FeatureExtractor, images: Tensor) -> int:
    """How many of `images` (N, C, H, W) one call takes: all on a device, on a CPU what its caches hold.

    Measured with convolutions on 32x32 images, one core: 1.31 ms an image in calls of 256, 0.36 ms in calls of 16.
    """
    weights = next(extractor.parameters(), None) if isinstance(extractor, nn.Module) else None
    if images.device.type != "cpu" or (weights is not None and weights.device.type != "cpu"):
        return max(1, len(images))
    return max(4, 2**14 // max(1, images.shape[-2] * images.shape[-1]))


def extract(extractor: FeatureExtractor, batches: Tensor | Iterable[Tensor], batch_size: int = 256) -> Tensor:
    """Features of many images: (N, D) fp32 on the CPU.

    Args:
        batches: one (N, C, H, W) tensor, cut into `batch_size`, or an iterable of such tensors.

    Raises:
        ValueError: no images, or features that are not finite (the image's index is named).
    """
    if isinstance(batches, Tensor):
        batches = batches.split(batch_size)
    parts: list[Tensor] = []
    seen = 0
    for batch in batches:
        with torch.no_grad():
            rows = rows_at_once(extractor, batch)
            part = torch.cat([extractor(chunk) for chunk in batch.split(rows)]).float().cpu()
        bad = ~torch.isfinite(part).all(dim=1)
        if bad.any():
            raise InputError(f"{extractor.name}: features of image {seen + int(bad.int().argmax())} are not finite")
        parts.append(part)
        seen += len(part)
    if not seen:
        raise ValueError("images: none were given")
    return torch.cat(parts)
