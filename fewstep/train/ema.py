"""Exponential moving averages of a module's parameters, by torch's foreach kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.networks.adapters import load_own_state, own_parameters, own_state, twin


class EMA:
    """One average: shadow := decay shadow + (1 - decay) weights, in float32; buffers are copied.

    Of an adapter it is a further LoRA set on the same base, whose factors are averaged one by one.
    Warm-up (decay limited to (1 + n) / (10 + n) after n updates) keeps the initial weights from dominating.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.module = twin(module).eval()
        for p in own_parameters(self.module):
            p.requires_grad_(False)
        self._lists: tuple[nn.Module | None, list[Tensor], list[Tensor]] = (None, [], [])

    @property
    def name(self) -> str:
        return f"ema_{self.decay}"

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if self._lists[0] is not module:
            weights = [p.detach() for p in own_parameters(module)]
            self._lists = (module, list(own_parameters(self.module)), weights)
        torch._foreach_lerp_(self._lists[1], self._lists[2], 1 - decay)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def reset(self, module: nn.Module) -> None:
        """Start again from a module's weights."""
        self.updates = 0
        load_own_state(self.module, own_state(module))
