"""Latents as tokens of 2 x 2 cells, as Flux and its descendants take them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(x: Tensor) -> Tensor:
    """(b, c, h, w) -> tokens (b, h/2 w/2, 4c) of 2 x 2 latents; h and w even."""
    b, c, h, w = x.shape
    if h % 2 or w % 2:
        raise ValueError(f"latents are packed 2 x 2, so height and width must be even, not {h} x {w}")
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, size: tuple[int, ...]) -> Tensor:
    """The inverse of `pack` for latents of height and width `size`."""
    h, w = size
    b, _, c = tokens.shape
    return tokens.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def places(x: Tensor, columns: int = 3) -> Tensor:
    """Positions (h/2 w/2, columns) of 2 x 2 cells of x: row in column 1, number within it in column 2."""
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    out = torch.zeros(h, w, columns, device=x.device, dtype=x.dtype)
    out[..., 1] = torch.arange(h, device=x.device, dtype=x.dtype)[:, None]
    out[..., 2] = torch.arange(w, device=x.device, dtype=x.dtype)
    return out.reshape(-1, columns)
