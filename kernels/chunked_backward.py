"""Cotangents of chunked attention, through the output and through its tangent."""

import torch
from torch import Tensor

from fewstep.kernels.chunked import Block, _Operand, _operand, _Scores
from fewstep.kernels.ranges import Ranges


class _Sum:
    """A gradient for keys or values, added into by key ranges."""

    def __init__(self, like: _Operand) -> None:
        self.data = torch.zeros_like(like.data, memory_format=torch.contiguous_format)

    def add(self, block: Block, columns: slice, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
        """Adds scale left^T right to the gathered columns of the block."""
        at = 0
        for r in block.keys:
            width = r.stop - r.start
            here = slice(at, at + width)
            at += width
            if columns.start <= here.start:
                head = self.data[block.first : block.last, r.start : r.stop]
                head.baddbmm_(left[..., here].transpose(1, 2), right, alpha=scale)


def attention_backward(
    do: Tensor | None,
    dto: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    o: Tensor,
    to: Tensor | None,
    *,
    mask: Tensor | None,
    ranges: Ranges | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv, dtq, dtk, dtv) from the cotangents do of o and dto of to, either of which may be None.

    Shapes and dtypes are those of the primals; tangent cotangents are None where the tangent or dto is.
    """
    scores = _Scores(q, k, tq, tk, mask, ranges, causal, scale)
    values, outputs = _Operand(v), _Operand(o)
    through = dto is not None
    moving, grad_o, grad_to = _operand(tv), _operand(do), _operand(dto)
    tangents = _operand(to) if through else None
    dq, dk, dv = torch.zeros_like(scores.q.data), _Sum(scores.k), _Sum(values)
    dtq = torch.zeros_like(scores.tq.data) if through and scores.tq is not None else None
    dtk = _Sum(scores.tk) if through and scores.tk is not None else None
    dtv = _Sum(moving) if through and moving is not None else None

    for b in scores.blocks():
        if not b.keys:
            continue
        at, every = (slice(b.first, b.last), slice(b.start, b.stop)), slice(0, None)
        keys, vals, out = scores.k.keys(b), values.keys(b), outputs.rows(b)
        p, _ = scores.probabilities(b, False)
        split = b.split
        tail = slice(split, None)
        ds = torch.zeros_like(p)
        if grad_o is not None:
            a = grad_o.rows(b)
            ds = torch.bmm(a, vals.transpose(1, 2)).sub_((a * out).sum(-1, keepdim=True))
            dv.add(b, every, p, a)
        if grad_to is not None and tangents is not None:
            g = grad_to.rows(b)
            ds.sub_((g * tangents.rows(b)).sum(-1, keepdim=True))
            if moving is not None and split < p.shape[-1]:
                part = moving.keys(b)[:, split:]
                ds[..., split:].baddbmm_(g, part.transpose(1, 2))
                if dtv is not None:
                    dtv.add(b, tail, p, g)
            t = scores.tangent(b)
            dt = torch.bmm(g, vals.transpose(1, 2)).sub_((g * out).sum(-1, keepdim=True))
            if t is not None:
                t.sub_((p * t).sum(-1, keepdim=True))
                ds.addcmul_(t, dt)
                dv.add(b, every, t.mul_(p), g)
            dt.mul_(p)
            if scores.tq is not None and dtq is not None and not b.still:
                dtq[at].baddbmm_(dt, keys, alpha=scale)
                dk.add(b, every, dt, scores.tq.rows(b), scale)
            if scores.tk is not None and dtk is not None and split < p.shape[-1]:
                dq[at].baddbmm_(dt[..., split:], scores.tk.keys(b)[:, split:], alpha=scale)
                dtk.add(b, tail, dt, scores.q.rows(b), scale)
        ds.mul_(p)
        dq[at].baddbmm_(ds, keys, alpha=scale)
        dk.add(b, every, ds, scores.q.rows(b), scale)

    def back(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if grad is None or like is None else grad.to(like.dtype).reshape(like.shape)

    dq_, dk_, dv_ = back(dq, q), back(dk.data, k), back(dv.data, v)
    return (
        dq_,
        dk_,
        dv_,
        back(dtq, tq),
        back(dtk.data if dtk else None, tk),
        back(dtv.data if dtv else None, tv),
    )
