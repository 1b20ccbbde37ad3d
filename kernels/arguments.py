"""Checks of the arguments of an attention call, all before anything is launched."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fewstep.kernels.ranges import Ranges

IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton", "sdpa", "xformers")
LAYOUTS = ("bhnd", "bnhd")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
_ANY_HEAD_DIM = ("reference", "chunked", "sdpa")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_names(impl: str, layout: str) -> None:
    """ValueError unless impl and layout are known names."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout!r} is not one of {', '.join(LAYOUTS)}")


def check_tensor(name: str, tensor: object) -> None:
    """ValueError unless tensor is a four-dimensional floating point tensor with no empty dimension."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {tensor.dtype} is not one of float16, bfloat16, float32, float64")
    if tensor.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions, got {tensor.dim()} in {_shape(tensor)}")
    if 0 in tensor.shape:
        raise ValueError(f"{name}: every dimension must be at least 1, got {_shape(tensor)}")


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tangents: Mapping[str, Tensor | None],
    mask: Tensor | None,
    ranges: Ranges | None,
    causal: bool,
    scale: float | None,
    impl: str,
) -> None:
    """ValueError naming the offending argument and what is allowed; shapes are (B, H, N, D)."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
    for name, tensor in (("k", k), ("v", v)):
        _same_kind(name, tensor, q)
        if tensor.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name}: batch and heads must be those of q, {tuple(q.shape[:2])}, got "
                f"{tuple(tensor.shape[:2])}; repeat the heads for grouped-query attention"
            )
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: head dimension must be that of q, {q.shape[3]}, got {k.shape[3]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v: length must be that of k, {k.shape[2]}, got {v.shape[2]}")
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[3] > MAX_HEAD_DIM and impl not in _ANY_HEAD_DIM:
            raise ValueError(
                f"{name}: head dimension {tensor.shape[3]} is over {MAX_HEAD_DIM}, the most that impl={impl!r} "
                f"takes; {', '.join(_ANY_HEAD_DIM)} take any"
            )
    for name, tangent in tangents.items():
        if tangent is not None:
            primal = {"tq": q, "tk": k, "tv": v}[name]
            check_tensor(name, tangent)
            _same_kind(name, tangent, q)
            if tangent.shape != primal.shape:
                raise ValueError(f"{name}: shape must be that of {name[1]}, {_shape(primal)}, got {_shape(tangent)}")
    if (mask is not None) + (ranges is not None) + bool(causal) > 1:
        raise ValueError("mask, ranges, causal: give at most one of them")
    if mask is not None:
        _check_mask(mask, q, k, impl)
    if ranges is not None:
        if not isinstance(ranges, Ranges):
            raise ValueError(f"ranges: expected fewstep.kernels.Ranges, got {type(ranges).__name__}")
        if (ranges.queries, ranges.keys) != (q.shape[2], k.shape[2]):
            raise ValueError(
                f"ranges: made for {ranges.queries} queries and {ranges.keys} keys, "
                f"but q has {q.shape[2]} and k has {k.shape[2]}"
            )
    if not isinstance(causal, bool):
        raise ValueError(f"causal: expected True or False, got {causal!r}")
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, int | float) or not -math.inf < scale < math.inf
    ):
        raise ValueError(f"scale: expected a finite number or None for 1/sqrt(D), got {scale!r}")


def _same_kind(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.dtype != q.dtype:
        raise ValueError(f"{name}: dtype must be that of q, {q.dtype}, got {tensor.dtype}")
    if tensor.device != q.device:
        raise ValueError(f"{name}: device must be that of q, {q.device}, got {tensor.device}")


def _check_mask(mask: Tensor, q: Tensor, k: Tensor, impl: str) -> None:
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask: expected a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and mask.dtype not in DTYPES:
        raise ValueError(f"mask: dtype must be bool (True = attend) or floating (added), got {mask.dtype}")
    if mask.device != q.device:
        raise ValueError(f"mask: device must be that of q, {q.device}, got {mask.device}")
    full = (*q.shape[:3], k.shape[2])
    tail = full[4 - mask.dim() :] if mask.dim() <= 4 else ()
    if mask.dim() > 4 or any(m not in (1, f) for m, f in zip(mask.shape, tail, strict=True)):
        raise ValueError(f"mask: shape must broadcast to (B, H, Nq, Nk) = {full}, got {_shape(mask)}")
    if mask.requires_grad and impl != "reference":
        raise ValueError(f"mask: a constant with impl={impl!r}; detach it, or use impl='reference'")
