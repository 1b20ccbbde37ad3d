"""Exact attention, tangent and cotangents in plain torch, a block of query rows at a time.

Peak extra memory is two score blocks of `threads x ROWS x M` entries, or SCORES where that is more, instead of
several N x M matrices per head. It is the CPU implementation and runs on any device. float16 and bfloat16 are
computed in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.kernels.ranges import KeyRange, Ranges

ROWS = 128
SCORES = ROWS * 1024
"""Entries of a score block that is made of several heads."""


@dataclass(frozen=True)
class Block:
    """Query rows start <= i < stop of heads first <= g < last and the key ranges they see, still ones first."""

    first: int
    last: int
    start: int
    stop: int
    keys: tuple[KeyRange, ...]
    still: bool

    @property
    def split(self) -> int:
        """Number of gathered key columns whose tangent is zero."""
        return sum(r.stop - r.start for r in self.keys if r.still)


def _blocks(groups: int, n: int, m: int, ranges: Ranges | None, causal: bool) -> Iterator[Block]:
    # One head per thread keeps the score block in cache while bmm runs the heads in parallel; of short sequences so
    # many that a block holds SCORES entries, or calls would cost more than what they compute.
    step = min(groups, max(1, torch.get_num_threads(), SCORES // max(1, min(n, ROWS) * m)))
    for first in range(0, groups, step):
        last = min(first + step, groups)
        if ranges is None:
            for start in range(0, n, ROWS):
                stop = min(start + ROWS, n)
                yield Block(first, last, start, stop, (KeyRange(0, min(m, stop) if causal else m),), False)
            continue
        for segment in ranges.segments:
            keys = tuple(sorted(segment.keys, key=lambda r: (not r.still, r.start)))
            for start in range(segment.start, segment.stop, ROWS):
                yield Block(first, last, start, min(start + ROWS, segment.stop), keys, segment.still)


class _Operand:
    """A (B, H, N, D) tensor as (B*H, N, D) in the compute dtype, read by row ranges."""

    def __init__(self, tensor: Tensor) -> None:
        dtype = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
        self.data = tensor.to(dtype).reshape(-1, *tensor.shape[2:])

    def rows(self, block: Block) -> Tensor:
        return self.data[block.first : block.last, block.start : block.stop]

    def keys(self, block: Block) -> Tensor:
        head = self.data[block.first : block.last]
        if len(block.keys) == 1:
            return head[:, block.keys[0].start : block.keys[0].stop]
        return torch.cat([head[:, r.start : r.stop] for r in block.keys], 1)


def _operand(tensor: Tensor | None) -> _Operand | None:
    return None if tensor is None else _Operand(tensor)


def _wide(*tensors: Tensor | None) -> _Operand | None:
    """The tensors side by side along the head dimension, None when any of them is missing."""
    if any(t is None for t in tensors):
        return None
    return _Operand(torch.cat([_Operand(t).data for t in tensors if t is not None], -1).unsqueeze(0))


class _Mask:
    def __init__(self, mask: Tensor | None, q: Tensor, k: Tensor, causal: bool) -> None:
        self.causal = causal
        self.heads = q.shape[1]
        self.shared = mask is None or mask.dim() <= 2 or (mask.dim() == 4 and mask.shape[:2] == (1, 1))
        self.mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])

    @property
    def dead_rows(self) -> bool:
        return self.mask is not None

    def apply(self, s: Tensor, block: Block) -> None:
        if self.causal:
            rows = torch.arange(block.start, block.stop, device=s.device)
            columns = torch.arange(s.shape[-1], device=s.device)
            s.masked_fill_(columns > rows[:, None], float("-inf"))
        if self.mask is None:
            return
        rows = slice(block.start, block.stop)
        if self.shared:
            part = self.mask[0, 0, rows]
        else:
            heads = [divmod(g, self.heads) for g in range(block.first, block.last)]
            part = torch.stack([self.mask[b, h, rows] for b, h in heads])
        if part.dtype == torch.bool:
            s.masked_fill_(~part, float("-inf"))
        else:
            s.add_(part)


def _probabilities(s: Tensor, keep_lse: bool) -> tuple[Tensor, Tensor | None]:
    """softmax in place; rows of -inf become zeros. lse is (g, rows) or None."""
    if not keep_lse:
        return torch.softmax(s, -1, out=s), None
    top = s.amax(-1, keepdim=True)
    top.masked_fill_(torch.isneginf(top), 0.0)
    total = s.sub_(top).exp_().sum(-1, keepdim=True)
    lse = (top + total.log()).squeeze(-1)
    return s.div_(total.masked_fill_(total == 0, 1.0)), lse


def _check_still(ranges: Ranges | None, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None) -> None:
    if ranges is None or not any(t is not None and t.device.type == "cpu" for t in (tq, tk, tv)):
        return
    for segment in ranges.segments:
        spans = [("q", tq, segment)] if segment.still else []
        spans += [(n, t, r) for r in segment.keys if r.still for n, t in (("k", tk), ("v", tv))]
        for name, tangent, span in spans:
            if tangent is not None and bool(tangent[:, :, span.start : span.stop].any()):
                raise ValueError(
                    f"ranges: positions [{span.start}, {span.stop}) are declared still, "
                    f"but the tangent of {name} is not zero there"
                )


def _product(left: Tensor, right: Tensor, scale: float, out: Tensor) -> Tensor:
    """scale left right^T into out in one pass: with beta=0 what out held, NaN included, is not read."""
    return torch.baddbmm(out, left, right.transpose(1, 2), beta=0, alpha=scale, out=out)


class _Scores:
    """Blocks of scores and of their tangents, in two buffers that are reused from block to block."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        tq: Tensor | None,
        tk: Tensor | None,
        mask: Tensor | None,
        ranges: Ranges | None,
        causal: bool,
        scale: float,
    ) -> None:
        self.q, self.k, self.tq, self.tk = _Operand(q), _Operand(k), _operand(tq), _operand(tk)
        # Only where both move: the copies cost a tenth of a call that needs one of them.
        both = tq is not None and tk is not None
        self.q2, self.k2 = (_wide(tq, q), _wide(k, tk)) if both else (None, None)
        self.scale, self.mask = scale, _Mask(mask, q, k, causal)
        self.groups, self.n, self.m = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
        self.ranges, self.causal = ranges, causal
        self._buffers: dict[str, Tensor] = {}

    def blocks(self) -> Iterator[Block]:
        return _blocks(self.groups, self.n, self.m, self.ranges, self.causal)

    def buffer(self, name: str, block: Block, columns: int) -> Tensor:
        shape = (block.last - block.first, block.stop - block.start, columns)
        size = shape[0] * shape[1] * shape[2]
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            rows = min(ROWS, self.n) * shape[0] * columns
            self._buffers[name] = held = self.q.data.new_empty(max(size, rows))
        return held[:size].view(shape)

    def probabilities(self, block: Block, keep_lse: bool) -> tuple[Tensor, Tensor | None]:
        keys = self.k.keys(block)
        s = self.buffer("s", block, keys.shape[1])
        _product(self.q.rows(block), keys, self.scale, s)
        self.mask.apply(s, block)
        if self.mask.dead_rows and not keep_lse:
            return _probabilities(s, True)[0], None
        return _probabilities(s, keep_lse)

    def tangent(self, block: Block) -> Tensor | None:
        """t = scale (tq k^T + q tk^T) on the allowed columns; None when it vanishes."""
        moving_q = self.tq is not None and not block.still
        split = block.split
        columns = sum(r.stop - r.start for r in block.keys)
        moving_k = self.tk is not None and split < columns
        if not moving_q and not moving_k:
            return None
        t = self.buffer("t", block, columns)
        if moving_q and moving_k and not split and self.q2 is not None and self.k2 is not None:
            return _product(self.q2.rows(block), self.k2.keys(block), self.scale, t)
        if moving_q and self.tq is not None:
            _product(self.tq.rows(block), self.k.keys(block), self.scale, t)
        else:
            t.zero_()
        if moving_k and self.tk is not None:
            keys = self.tk.keys(block)[:, split:]
            t[:, :, split:].baddbmm_(self.q.rows(block), keys.transpose(1, 2), alpha=self.scale)
        return t


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    ranges: Ranges | None = None,
    causal: bool = False,
    scale: float,
    keep_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """(o, lse) for q (B, H, N, D), k (B, H, M, D), v (B, H, M, Dv); o (B, H, N, Dv) in the dtype of q.

    lse is float32 (float64 for float64 inputs) of shape (B, H, N), or empty unless keep_lse.
    """
    scores, values = _Scores(q, k, None, None, mask, ranges, causal, scale), _Operand(v)
    o = values.data.new_zeros(scores.groups, q.shape[2], v.shape[3])
    lse = o.new_full((scores.groups, q.shape[2]) if keep_lse else (0,), float("-inf"))
    for b in scores.blocks():
        if not b.keys:
            continue
        p, part = scores.probabilities(b, keep_lse)
        o[b.first : b.last, b.start : b.stop] = torch.bmm(p, values.keys(b))
        if part is not None:
            lse[b.first : b.last, b.start : b.stop] = part
    shape = (*q.shape[:3], v.shape[3])
    return o.to(q.dtype).view(shape), lse.view(q.shape[:3]) if keep_lse else lse


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    *,
    mask: Tensor | None = None,
    ranges: Ranges | None = None,
    causal: bool = False,
    scale: float,
    keep_lse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, to, lse, mu) as reference.attention_jvp; lse and mu are empty unless keep_lse.

    to = p tv + h v - rowsum(h) o with h = p t, where each pair of products that shares an operand is one
    matmul of twice the width.
    """
    _check_still(ranges, tq, tk, tv)
    scores, values = _Scores(q, k, tq, tk, mask, ranges, causal, scale), _Operand(v)
    moving, both, width = _operand(tv), _wide(v, tv), v.shape[3]
    o = values.data.new_zeros(scores.groups, q.shape[2], width)
    to = torch.zeros_like(o)
    lse = o.new_full((scores.groups, q.shape[2]) if keep_lse else (0,), float("-inf"))
    mu = torch.zeros_like(lse)
    for b in scores.blocks():
        if not b.keys:
            continue
        at = (slice(b.first, b.last), slice(b.start, b.stop))
        p, part = scores.probabilities(b, keep_lse)
        h, split = scores.tangent(b), b.split
        if both is not None and not split:
            wide = torch.bmm(p, both.keys(b))
            out: Tensor = wide[..., :width]
            tangent: Tensor | None = wide[..., width:]
        else:
            out = torch.bmm(p, values.keys(b))
            tangent = None
            if moving is not None and split < p.shape[-1]:
                tangent = torch.bmm(p[..., split:], moving.keys(b)[:, split:])
        if h is not None:
            shift = h.mul_(p).sum(-1, keepdim=True)
            rest = torch.bmm(h, values.keys(b)).addcmul_(shift, out, value=-1.0)
            tangent = rest if tangent is None else rest.add_(tangent)
            if keep_lse:
                mu[at] = shift.squeeze(-1)
        o[at] = out
        if tangent is not None:
            to[at] = tangent
        if part is not None:
            lse[at] = part
    shape, rows = (*q.shape[:3], width), q.shape[:3]
    if keep_lse:
        lse, mu = lse.view(rows), mu.view(rows)
    return o.to(q.dtype).view(shape), to.to(q.dtype).view(shape), lse, mu


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    o: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None = None,
    ranges: Ranges | None = None,
    causal: bool = False,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(to, mu) given the primal's o (B, H, N, Dv) and lse (B, H, N); mu in lse's dtype."""
    _check_still(ranges, tq, tk, tv)
    scores, values, outputs = _Scores(q, k, tq, tk, mask, ranges, causal, scale), _Operand(v), _Operand(o)
    moving = _operand(tv)
    stats = lse.reshape(scores.groups, -1).to(values.data.dtype)
    stats = stats.masked_fill(torch.isneginf(stats), 0.0)
    additive = mask is not None and mask.dtype != torch.bool
    to = torch.zeros_like(outputs.data, memory_format=torch.contiguous_format)
    mu = to.new_zeros(scores.groups, q.shape[2])
    for b in scores.blocks():
        if not b.keys:
            continue
        at = (slice(b.first, b.last), slice(b.start, b.stop))
        keys = scores.k.keys(b)
        p = scores.buffer("s", b, keys.shape[1])
        _product(scores.q.rows(b), keys, scale, p)
        scores.mask.apply(p, b)
        if additive:
            # rows with every entry at -1e9 or so: their lse has no digits left for the scores
            p, _ = _probabilities(p, True)
        else:
            p.sub_(stats[at].unsqueeze(-1)).exp_()
        tangent, split = to[at], b.split
        if moving is not None and split < p.shape[-1]:
            tangent.baddbmm_(p[..., split:], moving.keys(b)[:, split:])
        h = scores.tangent(b)
        if h is not None:
            shift = h.mul_(p).sum(-1, keepdim=True)
            tangent.baddbmm_(h, values.keys(b)).sub_(shift * outputs.rows(b))
            mu[at] = shift.squeeze(-1)
    return to.to(q.dtype).view(o.shape), mu.view(lse.shape)
