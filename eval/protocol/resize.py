"""Resizing, cropping and quantising before the feature network: every convention the field uses, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fewstep.eval.errors import InputError

PIL_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


def quantise_edm(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 by floor(127.5 x + 128): EDM's rule."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def quantise_adm(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 by floor(127.5 (x + 1)): the rule of ADM, consistency models and DMD2's ImageNet
    code.
    """
    return ((images.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def quantise_truncate(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 by floor(255 (x + 1) / 2) after clamping: DMD2's SDXL code."""
    return ((images.float() + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8)


def quantise_round(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 by rounding 255 (x + 1) / 2 half to even: diffusers' image processor."""
    return ((images.float() + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8)


def quantise_none(images: Tensor) -> Tensor:
    """[-1, 1] -> fp32 in [0, 255], clamped, not rounded."""
    return ((images.float() + 1) * 127.5).clamp(0, 255)


QUANTISERS = {
    "edm": quantise_edm,
    "adm": quantise_adm,
    "truncate": quantise_truncate,
    "round": quantise_round,
    "none": quantise_none,
}


CHAINED = 64
"""Images that go through a chain at once: enlarged ones are large."""


def quantise(images: Tensor, rule: str | None) -> Tensor:
    """Generated images (N, C, H, W) in [-1, 1] -> pixels by the named rule of QUANTISERS; None changes nothing.

    Raises:
        ValueError: an unknown rule, or values that are not finite (clamping would turn them into pixels).
    """
    if rule is not None and rule not in QUANTISERS:
        raise ValueError(f"quantiser: unknown {rule!r}, expected one of {sorted(QUANTISERS)}")
    bad = ~torch.isfinite(images).flatten(1).all(dim=1)
    if bad.any():
        raise InputError(f"images: {int(bad.sum())} hold NaN or infinity, first {int(bad.int().argmax())}")
    return images if rule is None else QUANTISERS[rule](images)


@dataclass(frozen=True)
class Step:
    """One step of a chain: `op` is one of OPERATIONS, `size` the side of the square it leaves, in pixels."""

    op: str
    size: int | None = None


def centre_square(images: Tensor) -> Tensor:
    """The largest centred square of (N, C, H, W)."""
    side = min(images.shape[-2:])
    return centre_crop(images, side)


def centre_crop(images: Tensor, size: int) -> Tensor:
    """The centred `size` x `size` pixels; raises ValueError when the images are smaller."""
    height, width = images.shape[-2:]
    if min(height, width) < size:
        raise InputError(f"images: {height}x{width} pixels are too small for a crop of {size}")
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]


def resize_tensor(images: Tensor, size: int, mode: str, antialias: bool = True) -> Tensor:
    """Square resize on the images' own device: fp32, clamped to [0, 255], not rounded.

    With bicubic and antialias this is clean-fid's PIL float path to within 0.01 of 255 levels. Images of that size
    stay as they are, as Pillow leaves them.
    """
    if images.shape[-2:] == (size, size):
        return images.float().clamp(0, 255)
    resized = functional.interpolate(
        images.float(), size=(size, size), mode=mode, antialias=antialias, align_corners=False
    )
    return resized.clamp(0, 255)


def resize_pil(images: Tensor, size: int, mode: str, rounded: bool = False) -> Tensor:
    """Square resize by Pillow: channel by channel as floats, or of 8-bit images when `rounded`."""
    if rounded and images.dtype != torch.uint8:
        raise ValueError(f"images: an 8-bit resize needs uint8 pixels, got {images.dtype}")
    out = np.empty((*images.shape[:2], size, size), np.uint8 if rounded else np.float32)
    pixels = images.cpu().numpy() if rounded else images.float().cpu().numpy()
    for index in np.ndindex(*images.shape[:2]):
        # Pillow resizes the bands of an RGB image one by one, so bands alone give the same bytes.
        picture = Image.fromarray(np.ascontiguousarray(pixels[index]))
        out[index] = np.asarray(picture.resize((size, size), resample=PIL_FILTERS[mode]))
    resized = torch.from_numpy(out)
    return resized if rounded else resized.clamp_(0, 255)


OPERATIONS = {
    "centre-square": lambda x, size: centre_square(x),
    "centre-crop": centre_crop,
    "clean-bicubic": lambda x, size: resize_tensor(x, size, "bicubic"),
    "bilinear-antialias": lambda x, size: resize_tensor(x, size, "bilinear"),
    "bilinear": lambda x, size: resize_tensor(x, size, "bilinear", antialias=False),
    "pil-bicubic": lambda x, size: resize_pil(x, size, "bicubic"),
    "pil-bicubic-8bit": lambda x, size: resize_pil(x, size, "bicubic", rounded=True),
    "pil-lanczos": lambda x, size: resize_pil(x, size, "lanczos", rounded=True),
    "pil-bilinear": lambda x, size: resize_pil(x, size, "bilinear", rounded=True),
}


def apply_chain(images: Tensor, chain: Sequence[Step]) -> Tensor:
    """Run `images` (N, C, H, W) in [0, 255] through the steps in order.

    Raises:
        ValueError: an unknown operation, or a step without the size it needs.
    """
    for step in chain:
        if step.op not in OPERATIONS:
            raise ValueError(f"resize chain: unknown step {step.op!r}, expected one of {sorted(OPERATIONS)}")
        if step.op != "centre-square" and step.size is None:
            raise ValueError(f"resize chain: step {step.op!r} needs a size")
        images = OPERATIONS[step.op](images, step.size)
    return images
