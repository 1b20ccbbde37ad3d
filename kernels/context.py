"""use_fewstep_attention: every scaled_dot_product_attention inside it goes through fewstep.kernels.

Two routes. A TorchFunctionMode catches F.scaled_dot_product_attention, which all diffusers processors call in
the end; and the diffusers dispatcher gets a backend named "fewstep" for the models that ask it first.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from fewstep.kernels.api import attention
from fewstep.kernels.arguments import IMPLEMENTATIONS, MAX_HEAD_DIM
from fewstep.kernels.ranges import Ranges

_SDPA = F.scaled_dot_product_attention
_DISPATCH = "diffusers.models.attention_dispatch"


def _is_moving(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def _repeated(name: str, tensor: Tensor, query: Tensor) -> Tensor:
    """tensor with its heads repeated to those of query (grouped-query attention)."""
    mine, theirs = tensor.shape[-3], query.shape[-3]
    if theirs % mine:
        raise ValueError(f"{name}: enable_gqa needs a number of heads that divides the query's {theirs}, got {mine}")
    return tensor if mine == theirs else tensor.repeat_interleave(theirs // mine, -3)


def _four(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """(B, H, N, D) views of tensors whose leading dimensions broadcast, the mask to match, those dimensions."""
    leads = [tuple(x.shape[:-2]) for x in (query, key, value)]
    if len(leads[0]) == 2 and leads[0] == leads[1] == leads[2]:
        return query, key, value, mask, leads[0]
    try:
        lead = tuple(torch.broadcast_shapes(*leads))
    except RuntimeError:
        raise ValueError(
            f"query, key, value: leading dimensions must broadcast, got {', '.join(map(str, leads))}"
        ) from None

    def four(x: Tensor) -> Tensor:
        x = x.expand(*lead, *x.shape[-2:])
        return x.flatten(0, -4) if len(lead) > 2 else x[(None,) * (2 - len(lead))]

    if mask is not None and len(lead) > 2 and mask.dim() > 3:
        mask = mask.expand(*lead, *mask.shape[-2:]).flatten(0, -4)
    return four(query), four(key), four(value), mask, lead


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    impl: str = "auto",
    ranges: Ranges | None = None,
    calls: Counter[str] | None = None,
) -> Tensor:
    """F.scaled_dot_product_attention with tangents. Arguments as there, any leading dimensions that broadcast.

    ranges apply where the lengths match and there is no other mask. With impl="auto" a call without tangents
    and ranges is torch's own, dropout included. Raises ValueError for dropout under a jvp.
    """
    moving = _is_moving(query) or _is_moving(key) or _is_moving(value)
    fits = ranges is not None and (ranges.queries, ranges.keys) == (query.shape[-2], key.shape[-2])
    here = ranges if fits and attn_mask is None and not is_causal else None
    if not moving and here is None and impl in ("auto", "sdpa"):
        if calls is not None and not torch.compiler.is_compiling():
            calls["torch"] += 1
        return _SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if dropout_p > 0.0:
        raise ValueError(
            f"dropout_p: must be 0 with tangents, ranges or impl={impl!r}, got {dropout_p}; "
            "put the network in eval mode or set its attention dropout to 0"
        )
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < (3 if enable_gqa else 2):
            raise ValueError(f"{name}: expected (..., N, D) with a head dimension for enable_gqa, got {x.shape}")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    if enable_gqa:
        key, value = _repeated("key", key, query), _repeated("value", value, query)
    query, key, value, attn_mask, lead = _four(query, key, value, attn_mask)
    chosen = impl
    if impl == "auto" and max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        chosen = "chunked"
    out = attention(query, key, value, mask=attn_mask, ranges=here, causal=is_causal, scale=scale, impl=chosen)
    if calls is not None and not torch.compiler.is_compiling():
        calls["fewstep"] += 1
    if len(lead) == 2:
        return out
    return out.unflatten(0, lead[:-1]) if len(lead) > 2 else out[(0,) * (2 - len(lead))]


def register_diffusers_backend() -> str:
    """Adds "fewstep" to the attention backends of diffusers and returns that name.

    After it, model.set_attention_backend("fewstep") and diffusers' attention_backend("fewstep") work on the
    models that use the dispatcher (Flux, Wan and newer). Raises ImportError without diffusers. diffusers has
    no public registration, so this extends its enum; a test pins that it works.
    """
    from diffusers.models import attention_dispatch

    names = attention_dispatch.AttentionBackendName
    if "fewstep" in names._value2member_map_:
        return "fewstep"
    member = str.__new__(names, "fewstep")
    member._name_, member._value_ = "FEWSTEP", "fewstep"
    names._member_map_["FEWSTEP"] = member
    names._value2member_map_["fewstep"] = member
    names._member_names_.append("FEWSTEP")
    attention_dispatch._AttentionBackendRegistry.register(member)(_dispatched)
    return "fewstep"


def _dispatched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """The diffusers backend: (B, N, H, D) views in and out, no copies for the layout."""
    if return_lse or _parallel_config is not None:
        raise ValueError("attention backend 'fewstep': return_lse and context parallelism are not supported")
    if attn_mask is not None and attn_mask.dim() == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    # Inside the context the mode catches this call with its own impl and ranges; outside, auto applies.
    run = F.scaled_dot_product_attention if _ACTIVE else sdpa
    out = run(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return out.transpose(1, 2)


_ACTIVE: list["use_fewstep_attention"] = []
_SWAP = threading.RLock()


def attention_in_force() -> bool:
    """True inside a use_fewstep_attention."""
    return bool(_ACTIVE)


def attention_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """`context_fn` for torch.utils.checkpoint: the recompute gets the attention its forward had.

    torch runs the backward, and with it the recompute, outside every TorchFunctionMode; a block checkpointed
    inside use_fewstep_attention without this fails with CheckpointError.

        checkpoint(block, x, use_reentrant=False, context_fn=attention_contexts)
    """
    return nullcontext(), _again(tuple(_ACTIVE))


@contextmanager
def _again(contexts: tuple["use_fewstep_attention", ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


class use_fewstep_attention(TorchFunctionMode):
    """Context in which scaled_dot_product_attention has exact, memory-lean tangents.

    impl: as in attention(); the recipe key `attention` takes the same names. "auto" leaves calls without
    tangents to torch. ranges: applied to calls of exactly ranges.queries x ranges.keys that bring no mask.

    Reaches every diffusers model through F.scaled_dot_product_attention and, where diffusers is imported,
    through its dispatcher; a backend fixed by model.set_attention_backend(...) other than "native" is
    outside its reach. May be entered around a compiled call or inside the compiled function. `calls` counts
    eager calls, {"fewstep": ..., "torch": ...}: zero of both means the model was not reached.

        with use_fewstep_attention():
            out, tangent = torch.func.jvp(network, (x, t), (dx, dt))
    """

    def __init__(self, impl: str = "auto", *, ranges: Ranges | None = None) -> None:
        super().__init__()
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl: {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
        if ranges is not None and not isinstance(ranges, Ranges):
            raise ValueError(f"ranges: expected fewstep.kernels.Ranges, got {type(ranges).__name__}")
        self.impl = impl
        self.ranges = ranges
        self.calls: Counter[str] = Counter()
        self._previous: list[Any] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        mine = partial(sdpa, impl=self.impl, ranges=self.ranges, calls=self.calls)
        if func is _SDPA:
            return mine(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward and not torch.compiler.is_compiling():
            # This function of Python is overridden as a whole: no mode sees the attention inside it.
            with _SWAP:
                before, F.scaled_dot_product_attention = F.scaled_dot_product_attention, mine
                try:
                    return func(*args, **(kwargs or {}))
                finally:
                    F.scaled_dot_product_attention = before
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "use_fewstep_attention":
        if not torch.compiler.is_compiling():
            self._redirect()
        super().__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        if not torch.compiler.is_compiling() and self._previous:
            _ACTIVE.pop()
            module, backend = self._previous.pop()
            if module is not None:
                module._AttentionBackendRegistry.set_active_backend(backend)

    def _redirect(self) -> None:
        module = sys.modules.get(_DISPATCH)
        backend = None
        if module is not None:
            registry = module._AttentionBackendRegistry
            backend = registry._active_backend
            registry.set_active_backend(module.AttentionBackendName(register_diffusers_backend()))
        self._previous.append((module, backend))
        _ACTIVE.append(self)
