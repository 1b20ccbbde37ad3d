"""Bytes of tensors alive at the worst moment of a computation, on any device and also for fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


class Live(TorchDispatchMode):
    """Counts the storages that operations inside make, until they are freed.

    `peak` is their largest sum in bytes, `course` the sum after each operation.

    Args:
        known: tensors that exist already; views of them are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.course: list[int] = []
        self._sizes: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._seen, out)
        self.course.append(self.now)
        return out

    def reached(self, more: int) -> None:
        """Count as if `more` bytes beyond those alive had been alive for a moment."""
        self.peak = max(self.peak, self.now + more)
        self.course.append(self.now + more)

    def _seen(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def allocated(step: Callable[[], object]) -> int:
    """Bytes of CPU tensors alive at the worst moment of a call beyond those alive before it, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events: Any = profile.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]"]
    now = peak = 0
    for e in sorted(changes, key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    return peak


def make_fake(modules: Iterable[nn.Module], mode: Any) -> None:
    """Replace all parameters and buffers by fake ones of `mode`, in place; a tensor that is shared stays shared.

    Those on the meta device become fake ones of the CPU.
    """
    memo: dict[int, Any] = {}

    def made_of(t: Tensor) -> Any:
        if not t.is_meta:
            return mode.from_tensor(t.detach())
        with mode:
            return torch.empty(t.shape, dtype=t.dtype, device="cpu")

    def fake(t: Tensor) -> Any:
        if id(t) not in memo:
            made: Any = made_of(t)
            memo[id(t)] = (nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made, t)
        return memo[id(t)][0]

    for module in modules:
        for m in module.modules():
            for table in (m._parameters, m._buffers):
                for name, t in table.items():
                    if t is not None:
                        table[name] = fake(t)


def fake_mode() -> Any:
    """Tensors without memory: operations give shapes only, and every `if` that looks at their values is false."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Shapes(FakeTensorMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
                return False
            return super().__torch_dispatch__(func, types, args, kwargs)

    return Shapes(allow_non_fake_inputs=True)
