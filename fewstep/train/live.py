"""Bytes of tensors alive at the worst moment of a computation, on any device and also for fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


class Live(TorchDispatchMode):
    """Counts the storages that operations inside make, until they are freed; `peak` is their largest sum in bytes.

    Args:
        known: tensors that exist already; views of them are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._seen, out)
        return out

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


def make_fake(modules: Iterable[nn.Module], mode: Any) -> None:
    """Replace all parameters and buffers by fake ones of `mode`, in place; a tensor that is shared stays shared."""
    memo: dict[int, Any] = {}

    def fake(t: Tensor) -> Any:
        if id(t) not in memo:
            made: Any = mode.from_tensor(t.detach())
            memo[id(t)] = (nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made, t)
        return memo[id(t)][0]

    for module in modules:
        for m in module.modules():
            for table in (m._parameters, m._buffers):
                for name, t in table.items():
                    if t is not None:
                        table[name] = fake(t)


def fake_mode() -> Any:
    """Tensors without memory: operations give shapes only."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)
