"""Exponential moving averages of a module's parameters, by torch's foreach kernels."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """One average: shadow := decay shadow + (1 - decay) weights, in float32; buffers are copied.

    Warm-up (decay limited to (1 + n) / (10 + n) after n updates) keeps the initial weights from dominating.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(module).eval()
        for p in self.module.parameters():
            p.requires_grad_(False)

    @property
    def name(self) -> str:
        return f"ema_{self.decay}"

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        shadows, weights = list(self.module.parameters()), [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(shadows, weights, 1 - decay)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def reset(self, module: nn.Module) -> None:
        """Start again from a module's weights."""
        self.updates = 0
        self.module.load_state_dict(module.state_dict())
