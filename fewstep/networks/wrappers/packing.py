"""Latents as tokens of 2 x 2 cells, as Flux and its descendants take them."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.networks.patches import from_patches, patches


def pack(x: Tensor) -> Tensor:
    """(b, c, h, w) -> tokens (b, h/2 w/2, 4c) of 2 x 2 latents; h and w even."""
    h, w = x.shape[-2:]
    if h % 2 or w % 2:
        raise ValueError(f"latents are packed 2 x 2, so height and width must be even, not {h} x {w}")
    return patches(x, 2)


def unpack(tokens: Tensor, size: tuple[int, ...]) -> Tensor:
    """The inverse of `pack` for latents of height and width `size`."""
    return from_patches(tokens, size, 2)


def places(x: Tensor, columns: int = 3) -> Tensor:
    """Positions (h/2 w/2, columns) of 2 x 2 cells of x: row in column 1, number within it in column 2."""
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    out = torch.zeros(h, w, columns, device=x.device, dtype=x.dtype)
    out[..., 1] = torch.arange(h, device=x.device, dtype=x.dtype)[:, None]
    out[..., 2] = torch.arange(w, device=x.device, dtype=x.dtype)
    return out.reshape(-1, columns)
