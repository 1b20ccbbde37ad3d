"""attention, attention_jvp, attention_tangent and explain: one call, several implementations."""

import importlib.util
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.kernels import reference
from fewstep.kernels.arguments import check_call, check_names
from fewstep.kernels.operators import OPERATORS
from fewstep.kernels.ranges import Ranges

_HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Choice:
    """Which implementation a call runs, and why."""

    impl: str
    reason: str

    def __str__(self) -> str:
        return f"{self.impl}: {self.reason}"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_device(impl: str, device: torch.device) -> None:
    """ValueError when this implementation has no code for the device, whatever the shapes."""
    check_names(impl, "bhnd")
    if impl in ("triton", "xformers"):
        example = torch.empty(1, 1, 1, 16, device=device)
        _choose(example, example, "", None, impl)


def _choose(q: Tensor, v: Tensor, moving: str, ranges: Ranges | None, impl: str) -> Choice:
    """The implementation for checked arguments; ValueError where the named one cannot run them."""
    wide = max(q.shape[3], v.shape[3])
    if impl == "triton":
        if not _HAS_TRITON:
            raise ValueError("impl: 'triton' needs the triton package (pip install 'fewstep[triton]')")
        if q.dtype == torch.float64:
            raise ValueError("q: impl='triton' takes float16, bfloat16 and float32, got float64")
        if q.device.type != "cuda" and not _interpreted():
            raise ValueError(
                f"q: impl='triton' needs CUDA tensors, got {q.device}; use 'chunked' there "
                "(TRITON_INTERPRET=1 runs the kernels on a CPU for tests)"
            )
        if q.dtype == torch.float32 and wide > 128 and not _interpreted():
            raise ValueError(
                f"q: impl='triton' in float32 takes head dimensions to 128, got {wide}: Triton's compiler "
                "aborts the process on wider ones; use 'chunked', or float16 or bfloat16"
            )
        if q.dtype == torch.bfloat16 and _interpreted():
            raise ValueError("q: the Triton interpreter computes garbage in bfloat16; use float16 or float32")
        return Choice("triton", "asked for")
    if impl == "xformers":
        if moving:
            raise ValueError(f"impl: 'xformers' has no jvp, but {moving} has a tangent; use 'auto'")
        if ranges is not None:
            raise ValueError("ranges: impl='xformers' takes mask or causal; use 'auto' for ranges")
        if q.device.type != "cuda":
            raise ValueError(f"q: impl='xformers' has no kernel for {q.device}, only CUDA; use 'auto'")
        if q.dtype == torch.float64:
            raise ValueError("q: impl='xformers' takes float16, bfloat16 and float32, got float64")
        return Choice("xformers", "asked for")
    if impl != "auto":
        return Choice(impl, "asked for")
    if not moving and ranges is None:
        return Choice("sdpa", "no tangent and no ranges: torch's own attention is at matmul speed")
    need = f"tangents of {moving}" if moving else "ranges"
    if q.device.type != "cuda":
        return Choice("chunked", f"{need} on {q.device.type}, where Triton has no code generator")
    if not _HAS_TRITON:
        return Choice("chunked", f"{need}; triton is not installed")
    if q.dtype in (torch.float32, torch.float64):
        return Choice("chunked", f"{need} in {q.dtype}: exact dots that wide spill registers in Triton")
    return Choice("triton", f"{need} on {q.device}")


def _unpack(name: str, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    primal, tangent = forward_ad.unpack_dual(tensor)
    if tangent is not None and not torch.compiler.is_compiling() and tangent._is_zerotensor():
        return primal, None
    # functionalize hides a tangent here and would drop it from `primal`; the operator's own check still sees it
    return (tensor, None) if tangent is None else (primal, tangent)


def _constant(mask: Tensor | None, impl: str) -> None:
    if impl != "reference" and isinstance(mask, Tensor) and forward_ad.unpack_dual(mask).tangent is not None:
        raise ValueError(f"mask: has a tangent, but is a constant with impl={impl!r}; use impl='reference'")


def _moving(tangents: dict[str, Tensor | None]) -> str:
    return ", ".join(name[1:] for name, t in tangents.items() if t is not None)


def _swap(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t.transpose(1, 2) if isinstance(t, Tensor) and t.dim() == 4 else t for t in tensors]


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def _torch_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, moving: bool) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    if not moving:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    ranges: Ranges | None = None,
    causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
    layout: str = "bhnd",
) -> Tensor:
    """softmax(scale q k^T) v, with gradients, and with tangents when q, k or v carry them.

    q: (B, H, N, D), k: (B, H, M, D), v: (B, H, M, Dv), one floating dtype and device; with layout="bnhd"
    heads and sequence are exchanged, in the result too. Returns (B, H, N, Dv).

    mask: bool (True = attend) or floating (added), broadcastable to (B, H, N, M), without gradient or tangent
    except with "reference". "triton" takes finite values below -2e4 for -2e4.
    ranges: block ranges (see Ranges). causal: row i sees keys j <= i. At most one of the three.
    scale: default 1/sqrt(D). Rows that see no key give zero.

    Under one torch.func.jvp or forward_ad level, eager or inside torch.compile, the result carries the exact
    tangent; missing tangents are skipped, not computed with zeros. Gradients flow through output and
    tangent. A jvp inside a jvp raises. torch.func.grad and vjp do not see through the operator and raise;
    use impl="reference" for them.

    impl: "auto"; "chunked" (plain torch, any device); "triton"; "sdpa" (torch, its math path under a jvp);
    "xformers" (CUDA, no tangents); "reference". explain() tells what auto takes.

    Raises ValueError naming the argument for anything else, before any launch.
    """
    check_names(impl, layout)
    (q_, tq), (k_, tk), (v_, tv) = _unpack("q", q), _unpack("k", k), _unpack("v", v)
    _constant(mask, impl)
    if layout == "bnhd":
        q_, k_, v_, tq, tk, tv = _swap(q_, k_, v_, tq, tk, tv)  # type: ignore[assignment]
    tangents = {"tq": tq, "tk": tk, "tv": tv}
    check_call(q_, k_, v_, {}, mask, ranges, causal, scale, impl)
    c, moving = _scale(scale, q_), _moving(tangents)
    choice = _choose(q_, v_, moving, ranges, impl)
    if choice.impl in ("reference", "sdpa"):
        if layout == "bnhd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if choice.impl == "reference":
            out = reference.attention(q, k, v, mask=reference.dense_mask(q, k, mask, ranges, causal), scale=c)
        else:
            dense = mask if ranges is None else ranges.mask(q.device)
            out = _torch_sdpa(q, k, v, dense, causal, c, bool(moving))
        return out.transpose(1, 2) if layout == "bnhd" else out
    if choice.impl == "xformers":
        from fewstep.kernels.xformers_backend import attention as xformers_attention

        out = xformers_attention(q_, k_, v_, mask=mask, causal=causal, scale=c)
        return out.transpose(1, 2) if layout == "bnhd" else out
    flat = [] if ranges is None else ranges.encode()
    if not moving:
        out = OPERATORS.attention(q_, k_, v_, mask, flat, causal, c, choice.impl, False)[0]
        return out.transpose(1, 2) if layout == "bnhd" else out
    out, to, _, _ = OPERATORS.attention_jvp(q_, k_, v_, tq, tk, tv, mask, flat, causal, c, choice.impl, False)
    if layout == "bnhd":
        out, to = out.transpose(1, 2), to.transpose(1, 2)
    return forward_ad.make_dual(out, to)


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    ranges: Ranges | None = None,
    causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
    layout: str = "bhnd",
    return_lse: bool = False,
    return_mu: bool = False,
) -> tuple[Tensor, ...]:
    """Attention and its tangent as explicit values: (o, to[, lse][, mu]).

    Arguments as attention(); tq, tk, tv have the shapes of q, k, v, and None means zero and is skipped. At
    least one is needed. o, to: (B, H, N, Dv); lse, the logsumexp of the scaled scores (natural logarithm),
    and mu, its tangent: (B, H, N), float32 (float64 for float64). Gradients flow through o and to;
    differentiating lse or mu raises, except with "reference". impl: "auto", "chunked", "triton" or "reference".
    """
    check_names(impl, layout)
    inputs = {"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv}
    for name, tensor in inputs.items():
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(f"{name}: already carries a tangent; attention_jvp takes plain tensors")
    if impl in ("sdpa", "xformers"):
        raise ValueError(f"impl: {impl!r} has no explicit jvp; allowed are auto, chunked, triton, reference")
    if isinstance(mask, Tensor) and forward_ad.unpack_dual(mask).tangent is not None:
        raise ValueError("mask: already carries a tangent; attention_jvp takes plain tensors")
    if tq is None and tk is None and tv is None:
        raise ValueError("tq, tk, tv: at least one tangent is needed; without any, call attention()")
    if layout == "bnhd":
        q, k, v, tq, tk, tv = _swap(q, k, v, tq, tk, tv)  # type: ignore[assignment]
    tangents = {"tq": tq, "tk": tk, "tv": tv}
    check_call(q, k, v, tangents, mask, ranges, causal, scale, impl)
    c = _scale(scale, q)
    choice = _choose(q, v, _moving(tangents), ranges, impl)
    keep = return_lse or return_mu
    if choice.impl == "reference":
        dense = reference.dense_mask(q, k, mask, ranges, causal)
        o, to, lse, mu = reference.attention_jvp(q, k, v, tq, tk, tv, mask=dense, scale=c)
        wide = torch.promote_types(lse.dtype, torch.float32)
        lse, mu = lse.to(wide), mu.to(wide)
    else:
        flat = [] if ranges is None else ranges.encode()
        o, to, lse, mu = OPERATORS.attention_jvp(q, k, v, tq, tk, tv, mask, flat, causal, c, choice.impl, keep)
    if layout == "bnhd":
        o, to = o.transpose(1, 2), to.transpose(1, 2)
    return (o, to) + ((lse,) if return_lse else ()) + ((mu,) if return_mu else ())


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    ranges: Ranges | None = None,
    causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Only the tangent, when another kernel has already given o (B, H, N, Dv) and lse (B, H, N).

    Returns (to, mu). lse is the natural logsumexp of the scaled scores. Not differentiable: a gradient
    reaching to raises. Arguments otherwise as attention_jvp, in the (B, H, N, D) layout.
    """
    check_names(impl, "bhnd")
    for name, tensor in (("q", q), ("k", k), ("v", v), ("o", o), ("lse", lse)):
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(f"{name}: already carries a tangent; attention_tangent takes plain tensors")
    if impl not in ("auto", "chunked", "triton"):
        raise ValueError(f"impl: {impl!r} has no tangent-only pass; allowed are auto, chunked, triton")
    tangents = {"tq": tq, "tk": tk, "tv": tv}
    if not _moving(tangents):
        raise ValueError("tq, tk, tv: at least one tangent is needed")
    check_call(q, k, v, tangents, mask, ranges, causal, scale, impl)
    for name, tensor, shape in (("o", o, (*q.shape[:3], v.shape[3])), ("lse", lse, tuple(q.shape[:3]))):
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or tensor.device != q.device:
            raise ValueError(f"{name}: expected a tensor of shape {shape} on {q.device}")
    if o.dtype != q.dtype:
        raise ValueError(f"o: dtype must be that of q, {q.dtype}, got {o.dtype}")
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    if lse.dtype != wanted:
        raise ValueError(f"lse: dtype must be {wanted}, got {lse.dtype}")
    choice = _choose(q, v, _moving(tangents), ranges, impl)
    flat = [] if ranges is None else ranges.encode()
    return OPERATORS.attention_tangent(q, k, v, tq, tk, tv, o, lse, mask, flat, causal, _scale(scale, q), choice.impl)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tangents: str = "",
    mask: Tensor | None = None,
    ranges: Ranges | None = None,
    causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
    layout: str = "bhnd",
) -> Choice:
    """The implementation attention() would run for these arguments, and why; nothing is launched.

    tangents: letters of "qkv" to suppose tangents for, besides those q, k, v carry. Raises the ValueError
    that the call itself would raise.
    """
    check_names(impl, layout)
    if set(tangents) - set("qkv"):
        raise ValueError(f"tangents: letters of 'qkv' expected, got {tangents!r}")
    pairs = [_unpack("q", q), _unpack("k", k), _unpack("v", v)]
    _constant(mask, impl)
    plain = [p for p, _ in pairs]
    if layout == "bnhd":
        plain = _swap(*plain)  # type: ignore[assignment]
    check_call(plain[0], plain[1], plain[2], {}, mask, ranges, causal, scale, impl)
    moving = [n for n, (_, t) in zip("qkv", pairs, strict=True) if t is not None or n in tangents]
    return _choose(plain[0], plain[2], ", ".join(moving), ranges, impl)
