"""Launching the Triton kernels: block sizes, range tables, strides. Imported only when Triton is wanted."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from fewstep.kernels.layout import output_like
from fewstep.kernels.ranges import Ranges, Segment
from fewstep.kernels.triton_backward import backward_key_kernel, backward_query_kernel
from fewstep.kernels.triton_forward import attention_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Blocks:
    """Tile sizes and launch options of one kernel."""

    rows: int
    columns: int
    warps: int
    stages: int


def _candidates(kind: str, head_bytes: int, n: int, m: int, exact: bool = False) -> list[Blocks]:
    """Tile sizes to try in order; the next is taken where shared memory does not suffice.

    head_bytes: padded head dimension times bytes per element. A table instead of autotune, which re-tunes
    for every length and cannot run in the interpreter. Not yet tuned on a GPU.
    """
    table = {
        "jvp": ((128, Blocks(128, 64, 8, 3)), (256, Blocks(128, 32, 8, 3)), (512, Blocks(64, 32, 8, 2))),
        "plain": ((128, Blocks(128, 64, 4, 3)), (256, Blocks(128, 64, 8, 3)), (512, Blocks(64, 64, 4, 2))),
        "backward": ((128, Blocks(64, 64, 4, 2)), (256, Blocks(64, 64, 8, 2)), (512, Blocks(32, 32, 4, 2))),
        "through": ((128, Blocks(64, 32, 8, 2)), (256, Blocks(32, 32, 8, 1)), (512, Blocks(32, 16, 8, 1))),
    }[kind]
    first = next((blocks for limit, blocks in table if head_bytes <= limit), Blocks(32, 16, 4, 1))
    if exact:
        # IEEE float32 dots are unrolled into scalar FMAs: larger tiles spill or crash the compiler
        first = Blocks(32, 32, 8, 1)
    ladder = [first, Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1)]
    return [
        Blocks(_fit(b.rows, n), _fit(b.columns, m), b.warps, b.stages)
        for i, b in enumerate(ladder)
        if i == 0 or b.rows * b.columns <= first.rows * first.columns
    ]


def _fit(block: int, length: int) -> int:
    return max(16, min(block, triton.next_power_of_2(length)))


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


_CHOSEN: dict[tuple[Any, ...], Blocks] = {}


def _launch(key: tuple[Any, ...], candidates: list[Blocks], run: Callable[[Blocks], None]) -> None:
    from triton.runtime.errors import OutOfResources

    if key in _CHOSEN:
        return run(_CHOSEN[key])
    for blocks in candidates:
        try:
            run(blocks)
        except OutOfResources:
            continue
        _CHOSEN[key] = blocks
        return None
    raise RuntimeError(f"fewstep attention: no Triton tile size fits this GPU's shared memory for {key}")


@dataclass(frozen=True)
class _Table:
    """Tiles (start, stop, first, middle, last) and spans (start, stop); spans before middle are still."""

    tiles: Tensor
    spans: Tensor
    still: bool


@lru_cache(maxsize=128)
def _tables(ranges: Ranges, block: int, transposed: bool, device: torch.device) -> tuple[_Table, ...]:
    segments: tuple[Segment, ...] = ranges.transposed() if transposed else ranges.segments
    tables = []
    for still in (False, True):
        tiles: list[tuple[int, ...]] = []
        spans: list[tuple[int, int]] = []
        for segment in segments:
            if segment.still != still:
                continue
            ordered = sorted(segment.keys, key=lambda r: (not r.still, r.start))
            first, middle = len(spans), len(spans) + sum(r.still for r in ordered)
            spans += [(r.start, r.stop) for r in ordered]
            tiles += [
                (start, segment.stop, first, middle, len(spans)) for start in range(segment.start, segment.stop, block)
            ]
        if tiles:
            spans = spans or [(0, 0)]
            pair = (torch.tensor(x, dtype=torch.int32, device=device) for x in (tiles, spans))
            tables.append(_Table(*pair, still))
    return tuple(tables)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride())


def _mask(mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
    if mask is None:
        return q, (0, 0, 0, 0), 0
    kind = 1 if mask.dtype == torch.bool else 2
    full = mask.expand(*q.shape[:3], k.shape[2])
    return (full.view(torch.uint8) if kind == 1 else full), _strides(full), kind


def _options(q: Tensor, v: Tensor) -> dict[str, Any]:
    return {
        "BLOCK_D": _padded(q.shape[3]),
        "BLOCK_V": _padded(v.shape[3]),
        "UP": INTERPRETED and q.dtype == torch.bfloat16,
        # tf32 would cost three digits of the tangent
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def _head_bytes(q: Tensor, v: Tensor) -> int:
    return max(_padded(q.shape[3]), _padded(v.shape[3])) * q.element_size()


def _device(q: Tensor) -> Any:
    return torch.cuda.device(q.device) if q.device.type == "cuda" else torch.enable_grad()


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None,
    o: Tensor, to: Tensor, lse: Tensor, mu: Tensor, mask: Tensor | None, ranges: Ranges | None,
    causal: bool, scale: float, tangent: bool, given: bool,
) -> None:  # fmt: skip
    (b, h, n, d), m = q.shape, k.shape[2]
    masks, mask_strides, kind = _mask(mask, q, k)
    options = _options(q, v)

    def run(blocks: Blocks) -> None:
        tables = (None,) if ranges is None else _tables(ranges, blocks.rows, False, q.device)
        for table in tables:
            moving_q = tq if table is None or not table.still else None
            tensors = (q, k, v, *(q if t is None else t for t in (moving_q, tk, tv)), o, to)
            tiles, spans = (lse, lse) if table is None else (table.tiles, table.spans)
            count = triton.cdiv(n, blocks.rows) if table is None else len(tiles)
            # one dimension: the second holds 65,535 blocks, which temporal attention exceeds
            attention_kernel[(count * b * h,)](
                *tensors[:6], masks, o, to, lse, mu, tiles, spans,
                *(s for t in tensors for s in _strides(t)), *mask_strides,
                scale, h, n, m, d, v.shape[3], count,
                HAS_TQ=moving_q is not None, HAS_TK=tk is not None, HAS_TV=tv is not None,
                TANGENT=tangent, GIVEN=given, CAUSAL=causal, MASK=kind, RANGES=table is not None,
                BLOCK_M=blocks.rows, BLOCK_N=blocks.columns,
                num_warps=blocks.warps, num_stages=blocks.stages, **options,
            )  # fmt: skip

    name = "jvp" if tangent else "plain"
    sizes = _head_bytes(q, v)
    exact = q.dtype == torch.float32 and not INTERPRETED
    key = (name, given, sizes, q.dtype, q.device, _fit(128, n), _fit(64, m))
    with _device(q):
        _launch(key, _candidates(name, sizes, n, m, exact), run)


def forward(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, *,
    mask: Tensor | None, ranges: Ranges | None, causal: bool, scale: float, tangent: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, to, lse, mu); to and mu are meaningless unless tangent. lse, mu: float32 (B, H, N)."""
    o = output_like(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    to, mu = (output_like(q, v.shape[3]), torch.empty_like(lse)) if tangent else (o, lse)
    _run_forward(q, k, v, tq, tk, tv, o, to, lse, mu, mask, ranges, causal, scale, tangent, False)
    return o, to, lse, mu


def tangent(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None,
    o: Tensor, lse: Tensor, *,
    mask: Tensor | None, ranges: Ranges | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(to, mu) given o and lse of the primal."""
    to, lse = output_like(q, v.shape[3]), lse.contiguous()
    mu = torch.empty_like(lse)
    _run_forward(q, k, v, tq, tk, tv, o, to, lse, mu, mask, ranges, causal, scale, True, True)
    return to, mu


def backward(
    do: Tensor | None, dto: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    tq: Tensor | None, tk: Tensor | None, tv: Tensor | None,
    o: Tensor, to: Tensor | None, lse: Tensor, mu: Tensor | None, *,
    mask: Tensor | None, ranges: Ranges | None, causal: bool, scale: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dq, dk, dv, dtq, dtk, dtv) as chunked_backward.attention_backward."""
    (b, h, n, d), m, width = q.shape, k.shape[2], v.shape[3]
    masks, mask_strides, kind = _mask(mask, q, k)
    options = _options(q, v)
    through = dto is not None
    sub = torch.zeros_like(lse)
    beta, stat = sub, sub if mu is None else mu
    if do is not None:
        sub = sub + (do.float() * o.float()).sum(-1)
    if dto is not None and to is not None:
        sub = sub + (dto.float() * to.float()).sum(-1)
        beta = (dto.float() * o.float()).sum(-1)
    moving = [t if through else None for t in (tq, tk, tv)]
    grads = [output_like(p, p.shape[3]) for p in (q, k, v)]
    dq, dk, dv = grads
    # Tiles of a still segment never write their tangent cotangents: those are zero by declaration.
    dtq, dtk, dtv = (None if t is None else output_like(t, t.shape[3]).zero_() for t in moving)
    cotangents = (o if do is None else do, o if dto is None else dto)
    common = {"HAS_O": do is not None, "HAS_G": through, "CAUSAL": causal, "MASK": kind, **options}

    def run(blocks: Blocks, transposed: bool) -> None:
        size, length = (blocks.columns, m) if transposed else (blocks.rows, n)
        tables = (None,) if ranges is None else _tables(ranges, size, transposed, q.device)
        for table in tables:
            a, c, e = moving
            if table is not None and table.still:
                a, c, e = (a, None, None) if transposed else (None, c, e)
            inputs = (q, k, v, *(q if t is None else t for t in (a, c, e)), *cotangents)
            outs = [dk, dv, dtk, dtv] if transposed else [dq, dtq]
            outs = [dq if t is None else t for t in outs]
            tiles, spans = (lse, lse) if table is None else (table.tiles, table.spans)
            count = triton.cdiv(length, size) if table is None else len(tiles)
            kernel = backward_key_kernel if transposed else backward_query_kernel
            kernel[(count * b * h,)](
                *inputs, masks, *outs, lse, sub, beta, stat, tiles, spans,
                *(s for t in (*inputs, *outs) for s in _strides(t)), *mask_strides,
                scale, h, n, m, d, width, count,
                HAS_TQ=a is not None, HAS_TK=c is not None, HAS_TV=e is not None, RANGES=table is not None,
                BLOCK_M=blocks.rows, BLOCK_N=blocks.columns,
                num_warps=blocks.warps, num_stages=blocks.stages, **common,
            )  # fmt: skip

    name, sizes = ("through" if through else "backward"), _head_bytes(q, v)
    candidates = _candidates(name, sizes, n, m, q.dtype == torch.float32 and not INTERPRETED)
    with _device(q):
        for transposed in (False, True):
            key = (name, transposed, sizes, q.dtype, q.device, _fit(128, n), _fit(64, m))
            _launch(key, candidates, lambda blocks, t=transposed: run(blocks, t))
    return dq, dk, dv, dtq, dtk, dtv
