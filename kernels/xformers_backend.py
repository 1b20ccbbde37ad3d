"""xformers as an optional pass-through on CUDA; it has no forward-mode derivative."""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """(B, H, N, Dv) from memory_efficient_attention, whose layout is (B, N, H, D).

    A bool mask becomes an additive one. Raises ValueError when xformers is not installed.
    """
    try:
        from xformers import ops
    except ImportError as error:
        raise ValueError(
            "impl: 'xformers' needs the xformers package (pip install 'fewstep[xformers]', CUDA only)"
        ) from error
    bias = None
    if causal:
        bias = ops.LowerTriangularMask()
    elif mask is not None:
        bias = torch.zeros_like(mask, dtype=q.dtype) if mask.dtype == torch.bool else mask.to(q.dtype)
        if mask.dtype == torch.bool:
            bias = bias.masked_fill(~mask, float("-inf"))
        bias = bias.expand(*q.shape[:3], k.shape[2])
    swapped = (x.transpose(1, 2) for x in (q, k, v))
    return ops.memory_efficient_attention(*swapped, attn_bias=bias, scale=scale).transpose(1, 2)
