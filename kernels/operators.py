"""The torch operators behind fewstep.kernels: opaque to compilers, with gradients, deaf to nothing.

A torch.library operator under forward-mode AD returns a zero tangent without a word. These operators
therefore carry their own Autograd kernel, which raises when an input still has a tangent: that is what a
second nested jvp, or a jvp of a gradient, looks like from here. The tangent is an ordinary output whose
cotangent has a formula, so nothing is detached and no gradient is lost silently.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from fewstep.kernels import chunked, chunked_backward
from fewstep.kernels.layout import output_like
from fewstep.kernels.ranges import decode

_LIBRARY = torch.library.Library("fewstep", "FRAGMENT")
_TAIL = "Tensor? mask, int[] ranges, bool causal, float scale, str impl"

_LIBRARY.define(f"attention(Tensor q, Tensor k, Tensor v, {_TAIL}, bool keep_lse) -> (Tensor, Tensor)")
_LIBRARY.define(
    "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? tq, Tensor? tk, Tensor? tv, "
    f"{_TAIL}, bool keep_lse) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "attention_tangent(Tensor q, Tensor k, Tensor v, Tensor? tq, Tensor? tk, Tensor? tv, "
    f"Tensor o, Tensor lse, {_TAIL}) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "attention_backward(Tensor? do, Tensor? dto, Tensor q, Tensor k, Tensor v, Tensor? tq, Tensor? tk, "
    "Tensor? tv, Tensor o, Tensor? to, Tensor lse, Tensor? mu, "
    f"{_TAIL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
OPERATORS = torch.ops.fewstep


def _triton() -> Any:
    from fewstep.kernels import triton_launch

    return triton_launch


def _allocate(q: Tensor, width: int, impl: str) -> Tensor:
    return output_like(q, width) if impl == "triton" else q.new_empty(*q.shape[:3], width)


def _statistic(q: Tensor, keep: bool) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:3] if keep else (0,), dtype=dtype)


def _attention(q, k, v, mask, ranges, causal, scale, impl, keep_lse):
    options = {"mask": mask, "ranges": decode(ranges), "causal": causal, "scale": scale}
    if impl == "triton":
        o, _, lse, _ = _triton().forward(q, k, v, None, None, None, **options)
        return o, lse
    return chunked.attention(q, k, v, **options, keep_lse=keep_lse)


def _attention_jvp(q, k, v, tq, tk, tv, mask, ranges, causal, scale, impl, keep_lse):
    options = {"mask": mask, "ranges": decode(ranges), "causal": causal, "scale": scale}
    if impl == "triton":
        return _triton().forward(q, k, v, tq, tk, tv, **options, tangent=True)
    return chunked.attention_jvp(q, k, v, tq, tk, tv, **options, keep_lse=keep_lse)


def _attention_tangent(q, k, v, tq, tk, tv, o, lse, mask, ranges, causal, scale, impl):
    options = {"mask": mask, "ranges": decode(ranges), "causal": causal, "scale": scale}
    run = _triton().tangent if impl == "triton" else chunked.attention_tangent
    return run(q, k, v, tq, tk, tv, o, lse, **options)


def _attention_backward(do, dto, q, k, v, tq, tk, tv, o, to, lse, mu, mask, ranges, causal, scale, impl):
    options = {"mask": mask, "ranges": decode(ranges), "causal": causal, "scale": scale}
    if impl == "triton":
        grads = _triton().backward(do, dto, q, k, v, tq, tk, tv, o, to, lse, mu, **options)
    else:
        grads = chunked_backward.attention_backward(do, dto, q, k, v, tq, tk, tv, o, to, **options)
    return tuple(q.new_empty(0) if g is None else g for g in grads)


def _fake_attention(q, k, v, mask, ranges, causal, scale, impl, keep_lse):
    return _allocate(q, v.shape[3], impl), _statistic(q, keep_lse or impl == "triton")


def _fake_attention_jvp(q, k, v, tq, tk, tv, mask, ranges, causal, scale, impl, keep_lse):
    keep = keep_lse or impl == "triton"
    outputs = _allocate(q, v.shape[3], impl), _allocate(q, v.shape[3], impl)
    return (*outputs, _statistic(q, keep), _statistic(q, keep))


def _fake_attention_tangent(q, k, v, tq, tk, tv, o, lse, mask, ranges, causal, scale, impl):
    return _allocate(q, v.shape[3], impl), _statistic(q, True)


def _fake_attention_backward(do, dto, q, k, v, tq, tk, tv, o, to, lse, mu, mask, ranges, causal, scale, impl):
    def like(x: Tensor, needed: bool = True) -> Tensor:
        if not needed:
            return q.new_empty(0)
        return _allocate(x, x.shape[3], impl)

    through = dto is not None
    tangents = [like(p, through and t is not None) for p, t in ((q, tq), (k, tk), (v, tv))]
    return (like(q), like(k), like(v), *tangents)


def _setup(ctx, inputs, output):
    # Without materialised gradients a missing cotangent stays None, so the backward sees which outputs
    # the loss really used; a guard Function would vanish under torch.compile.
    ctx.set_materialize_grads(False)
    q, k, v, mask, ctx.ranges, ctx.causal, ctx.scale, ctx.impl, _ = inputs
    ctx.save_for_backward(q, k, v, output[0], output[1], mask)


def _backward(ctx, do, dlse):
    if dlse is not None:
        raise RuntimeError("fewstep attention: the gradient of lse is not implemented; detach lse")
    if do is None:
        return (None,) * 9
    q, k, v, o, lse, mask = ctx.saved_tensors
    grads = OPERATORS.attention_backward(
        do, None, q, k, v, None, None, None, o, None, lse, None,
        mask, ctx.ranges, ctx.causal, ctx.scale, ctx.impl,
    )  # fmt: skip
    return (*grads[:3], *(None,) * 6)


def _setup_jvp(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    q, k, v, tq, tk, tv, mask, ctx.ranges, ctx.causal, ctx.scale, ctx.impl, _ = inputs
    ctx.save_for_backward(q, k, v, tq, tk, tv, *output, mask)


def _backward_jvp(ctx, do, dto, dlse, dmu):
    if dlse is not None or dmu is not None:
        raise RuntimeError("fewstep attention: the gradient of lse and mu is not implemented; detach them")
    if do is None and dto is None:
        return (None,) * 12
    q, k, v, tq, tk, tv, o, to, lse, mu, mask = ctx.saved_tensors
    if dto is None:
        tq = tk = tv = to = mu = None
    grads = OPERATORS.attention_backward(
        do, dto, q, k, v, tq, tk, tv, o, to, lse, mu,
        mask, ctx.ranges, ctx.causal, ctx.scale, ctx.impl,
    )  # fmt: skip
    tangents = (g if t is not None else None for g, t in zip(grads[3:], (tq, tk, tv), strict=True))
    return (*grads[:3], *tangents, *(None,) * 6)


def _setup_none(ctx, inputs, output):
    ctx.set_materialize_grads(False)


def _refuse(what: str) -> Callable[..., Any]:
    def backward(ctx, *cotangents):
        raise RuntimeError(f"fewstep attention: the gradient of {what} is not implemented; use impl='reference' for it")

    return backward


def _guarded(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(keyset, *args):
        for arg in args:
            if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
                raise NotImplementedError(
                    "fewstep attention: forward-mode AD of the operator itself (a jvp inside a jvp, a jvp of "
                    "a gradient, or a direct call of torch.ops.fewstep) is not implemented; call "
                    "fewstep.kernels.attention under a single jvp, or use impl='reference'"
                )
        return kernel(keyset, *args)

    return run


def _register(name: str, run: Any, fake: Any, setup: Any, backward: Any) -> None:
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fewstep::{name}", fake, lib=_LIBRARY)
    kernel = make_autograd_impl(getattr(OPERATORS, name).default, Info(backward, setup))
    _LIBRARY.impl(name, _guarded(kernel), "Autograd", with_keyset=True)


_register("attention", _attention, _fake_attention, _setup, _backward)
_register("attention_jvp", _attention_jvp, _fake_attention_jvp, _setup_jvp, _backward_jvp)
_register(
    "attention_tangent",
    _attention_tangent,
    _fake_attention_tangent,
    _setup_none,
    _refuse("the tangent-only pass"),
)
_register(
    "attention_backward",
    _attention_backward,
    _fake_attention_backward,
    _setup_none,
    _refuse("a gradient (double backward)"),
)
