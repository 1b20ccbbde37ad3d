"""How outputs lie in memory."""

from __future__ import annotations

from torch import Tensor


def output_like(q: Tensor, width: int) -> Tensor:
    """Empty (B, H, N, width) laid out in memory as q is: heads inside the sequence or outside it."""
    b, h, n, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(b, n, h, width).transpose(1, 2)
    return q.new_empty(b, h, n, width)
