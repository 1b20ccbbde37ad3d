"""Attention, its tangent and its cotangents written straight from the definition; fp64 in, fp64 out.

Nothing here is fast: every N x M matrix is formed. It is what the other implementations are tested against,
and since it consists of ordinary differentiable operations, any order of forward and reverse mode works.

With c = scale: s = c q k^T, p = softmax(s), o = p v, L = logsumexp(s),
t = c (tq k^T + q tk^T), mu = rowsum(p t), to = p tv + (p (t - mu)) v.
"""

import torch
from torch import Tensor

from fewstep.kernels.ranges import Ranges


def dense_mask(q: Tensor, k: Tensor, mask: Tensor | None, ranges: Ranges | None, causal: bool) -> Tensor | None:
    """The mask, ranges or causal flag of a call as one mask broadcastable to (B, H, N, M), or None."""
    if ranges is not None:
        return ranges.mask(q.device)
    if causal:
        return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return mask


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    s = scale * (q @ k.transpose(-1, -2))
    if mask is None:
        return s
    return s.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else s + mask.to(s.dtype)


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    # logsumexp of a row of -inf has NaN gradients, so dead rows get finite scores first
    dead = torch.isneginf(s).all(-1, keepdim=True)
    s = s.masked_fill(dead, 0.0)
    lse = torch.logsumexp(s, -1, keepdim=True)
    # not exp(s - lse): a row masked by -1e9 throughout has an lse without digits for its scores
    p = torch.softmax(s, -1).masked_fill(dead, 0.0)
    return p, lse.masked_fill(dead, float("-inf"))


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v for q (B, H, N, D), k (B, H, M, D), v (B, H, M, Dv); (B, H, N, Dv).

    Rows with every key masked give zero.
    """
    s = _scores(q, k, mask, scale)
    if mask is None:
        return torch.softmax(s, -1) @ v
    return _softmax(s)[0] @ v


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, to, lse, mu): o, to (B, H, N, Dv); lse and its tangent mu (B, H, N). None tangents are zero."""
    s = _scores(q, k, mask, scale)
    p, lse = _softmax(s)
    t = torch.zeros_like(s)
    if tq is not None:
        t = t + scale * (tq @ k.transpose(-1, -2))
    if tk is not None:
        t = t + scale * (q @ tk.transpose(-1, -2))
    mu = (p * t).sum(-1, keepdim=True)
    to = (p * (t - mu)) @ v
    if tv is not None:
        to = to + p @ tv
    return p @ v, to, lse.squeeze(-1), mu.squeeze(-1)
