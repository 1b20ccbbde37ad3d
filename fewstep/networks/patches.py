"""Pictures as tokens of patches, and back."""

from __future__ import annotations

from torch import Tensor


def patches(x: Tensor, patch: int) -> Tensor:
    """(b, c, h, w) -> tokens (b, h/p w/p, c p p), row by row; p divides h and w."""
    b, c, h, w = x.shape
    cells = x.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(b, h * w // patch**2, c * patch**2)


def from_patches(tokens: Tensor, size: tuple[int, ...], patch: int) -> Tensor:
    """The inverse of `patches` for pictures of height and width `size`."""
    (h, w), (b, _, d) = size, tokens.shape
    c = d // patch**2
    cells = tokens.reshape(b, h // patch, w // patch, c, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(b, c, h, w)
