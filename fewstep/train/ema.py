"""Exponential moving averages of a module's parameters, by torch's foreach kernels."""

from __future__ import annotations

import torch
from torch import nn

from fewstep.networks.adapters import load_own_state, own_parameters, own_state, twin
from fewstep.train.parallel import local


class EMA:
    """One average: shadow := decay shadow + (1 - decay) weights, in float32; buffers are copied.

    Of an adapter it is a further LoRA set on the same base, whose factors are averaged one by one.
    The decay is limited to (1 + n) / (w + n) after n updates, w the warm-up, so that the initial weights do not
    dominate: until `decay` is reached the window is n / (w - 1) updates, which makes it the power-function
    average of EDM2 (arXiv 2312.02696, eq. 4) with gamma = w - 2.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: float = 10.0) -> None:
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.module = twin(module).eval()
        for p in own_parameters(self.module):
            p.requires_grad_(False)
        self._lists: tuple[nn.Module | None, list[nn.Parameter], list[nn.Parameter]] = (None, [], [])

    @property
    def name(self) -> str:
        return f"ema_{self.decay}"

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (self.warmup + self.updates))
        self.updates += 1
        if self._lists[0] is not module:
            self._lists = (module, own_parameters(self.module), own_parameters(module))
        _, shadows, weights = self._lists
        torch._foreach_lerp_([local(p) for p in shadows], [local(p.detach()) for p in weights], 1 - decay)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def reset(self, module: nn.Module) -> None:
        """Start again from a module's weights."""
        self.updates = 0
        load_own_state(self.module, own_state(module))
