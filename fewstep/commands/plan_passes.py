"""Passes through blocks that a trace has seen before: outputs, gradients and peak by shape, without tracing them anew.

Of fake tensors alone, whose values nothing depends on. A transformer of 57 blocks of two kinds, called ten times in a
step, is traced once for each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from fewstep.networks.adapters import active, checkpoint_function, lora_layers
from fewstep.networks.wrappers import Wrapper
from fewstep.train.live import Live

LEAST = 4
"""Modules inside one that is worth a memory of its own."""


@dataclass(frozen=True)
class _Shape:
    shape: torch.Size
    dtype: torch.dtype

    def made(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype)


def _shapes(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: _Shape(t.shape, t.dtype), tree)


@dataclass
class Passes:
    """What models and their repeated blocks answered to inputs of a shape, forward and backward."""

    forward: dict[Any, tuple[Any, int]] = field(default_factory=dict)
    """Outputs, and bytes at the worst moment beyond those before it."""
    backward: dict[Any, tuple[list[Any], int]] = field(default_factory=dict)
    """Gradients of a checkpointed block, None for what has none, and the worst moment."""
    live: Live | None = None
    """Of the turn that is traced."""
    held: dict[int, Tensor] = field(default_factory=dict)
    """Casts of trained weights, which autocast keeps to its end."""

    @contextmanager
    def of(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Within it the diffusers models inside these modules, and their blocks, answer repeats from here."""
        wrappers = [w for m in modules for w in m.modules() if isinstance(w, Wrapper)]
        models: list[Any] = list({id(w.model): w.model for w in wrappers}.values())
        patched: list[Any] = []
        for model in models:
            layers = lora_layers(model)
            lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
            blocks = [b for some in lists for b in some if b is not None and sum(1 for _ in b.modules()) >= LEAST]
            for block in {id(b): b for b in (model, *blocks)}.values():
                if "forward" not in vars(block):
                    block.forward = self._remembering(block, block.forward, layers)
                    patched.append(block)
            if getattr(model, "is_gradient_checkpointing", False):
                model.enable_gradient_checkpointing(self._checkpoint(model, layers))
        try:
            yield
        finally:
            for block in patched:
                del block.forward

    def turn(self, live: Live | None) -> None:
        """Begin or end a turn."""
        self.live, self.held = live, {}

    def plain(self, inside: Sequence[nn.Module]) -> bool:
        """Whether a pass is to be traced as it is: taps are hooks, which only a real pass calls, and tangents none."""
        transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
        return self.live is None or transformed or any(m._forward_hooks for m in inside)

    def once(self, key: Any, inputs: Any, call: Callable[[], Any]) -> Any:
        """What a pass without gradients answers; traced the first time that its key is seen.

        An output that is an input, or another output (the skips of a UNet), is so again.
        """
        live = self.live
        assert live is not None
        given = [v for v in tree_flatten(inputs)[0] if isinstance(v, Tensor)]
        if key in self.forward:
            (leaves, structure), most = self.forward[key]
            live.reached(most)
            known = list(given)
            for leaf in leaves:
                known.append(known[leaf] if isinstance(leaf, int) else leaf.made() if isinstance(leaf, _Shape) else leaf)
            return tree_unflatten(known[len(given) :], structure)
        now, seen = live.now, len(live.course)
        out = call()
        leaves, structure = tree_flatten(out)
        self.forward[key] = (_told(given, leaves), structure), max(live.course[seen:], default=now) - now
        return out

    def _remembering(self, block: nn.Module, forward: Any, layers: Sequence[Any]) -> Any:
        inside = list(block.modules())

        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() or self.plain(inside):
                return forward(*args, **kwargs)
            given = (args, kwargs)
            return self.once(key_of(block, layers, given), given, lambda: forward(*args, **kwargs))

        return run

    def _checkpoint(self, net: nn.Module, layers: Sequence[Any]) -> Any:
        """A `gradient_checkpointing_func` of diffusers: as `adapters.checkpoint_function`, with a memory."""
        other = checkpoint_function(net)

        def run(block: Any, *args: Any) -> Any:
            if not isinstance(block, nn.Module) or self.plain(list(block.modules())):
                return other(block, *args)
            leaves, structure = tree_flatten(args)
            trained = [p for p in block.parameters() if p.requires_grad]
            if torch.is_autocast_enabled("cpu"):
                dtype = torch.get_autocast_dtype("cpu")
                fresh = (p for p in trained if p.dtype is torch.float32 and id(p) not in self.held)
                self.held |= {id(p): torch.empty(p.shape, dtype=dtype) for p in fresh}
            call = _Call(self, block, layers, leaves, structure)
            out = _Block.apply(call, *[v for v in leaves if isinstance(v, Tensor)], *trained)
            return call.shaped(out)

        return run


def _told(given: Sequence[Tensor], leaves: Sequence[Any]) -> list[Any]:
    """Outputs as shapes, or the number of the input or earlier output whose memory they are."""
    at: dict[tuple[Any, ...], int] = {}
    out: list[Any] = []
    for i, leaf in enumerate((*given, *leaves)):
        what: Any = leaf
        if isinstance(leaf, Tensor):
            name = (leaf.untyped_storage()._cdata, leaf.shape, leaf.dtype)
            what = at[name] if name in at else _Shape(leaf.shape, leaf.dtype)
            at.setdefault(name, i)
        out.append(what)
    return out[len(given) :]


def key_of(block: nn.Module, layers: Sequence[Any], inputs: Any, grad: bool = False) -> Any:
    """Whatever the shapes of a pass depend on, with gradients or without; equal blocks of one class are one."""
    given, structure = tree_flatten(inputs)
    told = tuple((v.shape, v.dtype, grad and v.requires_grad) if isinstance(v, Tensor) else repr(v) for v in given)
    weights = sorted(repr((tuple(p.shape), p.dtype, grad and p.requires_grad)) for p in block.parameters())
    adapter = None
    if layers and not layers[0]._disable_adapters:
        adapter = tuple(layers[0].r.get(name) for name in layers[0]._active_adapter)
    return type(block), tuple(weights), adapter, told, repr(structure), torch.is_autocast_enabled("cpu")


@dataclass
class _Call:
    """One call of a checkpointed block."""

    passes: Passes
    block: nn.Module
    layers: Sequence[Any]
    leaves: list[Any]
    structure: Any
    out: Any = None

    def shaped(self, tensors: Sequence[Tensor]) -> Any:
        """The block's outputs with these tensors in place of its own."""
        left = iter(tensors)
        return tree_map_only(_Shape, lambda _: next(left), self.out)

    def args(self, tensors: Sequence[Tensor]) -> Any:
        left = iter(tensors)
        return tree_unflatten([next(left) if isinstance(v, Tensor) else v for v in self.leaves], self.structure)


class _Block(torch.autograd.Function):
    """A block whose inputs alone are kept; its backward pass computes it again, or says what that did before."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = sum(isinstance(v, Tensor) for v in call.leaves)
        ctx.call, ctx.count = call, count
        ctx.save_for_backward(*tensors)
        layers = call.layers
        ctx.adapters = () if not layers or layers[0]._disable_adapters else tuple(layers[0]._active_adapter)
        ctx.cast = torch.is_autocast_enabled("cpu")
        with _autocast(ctx.cast):
            out = call.block(*call.args(tensors[:count]))
        call.out = _shapes(out)
        call.leaves = [_MARK if isinstance(v, Tensor) else v for v in call.leaves]
        return tuple(v for v in tree_flatten(out)[0] if isinstance(v, Tensor))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        call, live, tensors = ctx.call, ctx.call.passes.live, ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad(), _autocast(ctx.cast), active(call.layers, *ctx.adapters):
            inputs = [t.detach().requires_grad_(n) for t, n in zip(tensors[: ctx.count], needed, strict=False)]
            key = (key_of(call.block, call.layers, call.args(inputs), True), tuple(g is None for g in grads))
            if key in call.passes.backward:
                shapes, most = call.passes.backward[key]
                live.reached(most)
                return None, *(s and s.made() for s in shapes)
            now, seen = live.now, len(live.course)
            out = [v for v in tree_flatten(call.block(*call.args(inputs)))[0] if isinstance(v, Tensor)]
            asked = [(t, n) for t, n in zip((*inputs, *tensors[ctx.count :]), needed, strict=True)]
            pairs = [(o, g) for o, g in zip(out, grads, strict=True) if g is not None and o.requires_grad]
        found = iter(torch.autograd.grad([o for o, _ in pairs], [t for t, n in asked if n], [g for _, g in pairs],
                                         allow_unused=True))  # fmt: skip
        result = [next(found) if n else None for _, n in asked]
        call.passes.backward[key] = [_shapes(g) for g in result], max(live.course[seen:], default=now) - now
        return None, *result


def _autocast(enabled: bool) -> Any:
    """Without its memory of casts, which `Passes.held` has."""
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=False)


_MARK = torch.empty(0)
"""In the place of a tensor among the arguments of a call, so that none is kept."""
