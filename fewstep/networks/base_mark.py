"""Which weights an adapter belongs to, by a few of their values: tells a clearly different base, not a near fine-tune."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fewstep.networks.adapters import own_state

KEY = "fewstep_base"
"""Of the mark in the header of a LoRA file."""
COUNT = 64
"""Tensors that are looked at, one value of each."""
NEAR = 0.01
"""Relative difference that rounding to half precision leaves at most, with room; so near is a light fine-tune, too."""
SHARE = 0.9
"""Of the values that must agree."""


def mark_of(model: nn.Module) -> dict[str, float]:
    """Values of weights by name, from the middle of tensors spread over the model; adapters in it are not looked at."""
    tensors = {k: v for k, v in sorted(own_state(model).items()) if v.is_floating_point() and v.numel()}
    names = list(tensors)
    chosen = [names[i * len(names) // COUNT] for i in range(COUNT)] if len(names) > COUNT else names
    return {name: float(tensors[name].flatten()[tensors[name].numel() // 2].to(torch.bfloat16)) for name in chosen}


def written(model: nn.Module) -> str:
    """The mark as it stands in a header."""
    return json.dumps(mark_of(model))


def differs(model: nn.Module, told: Any) -> str:
    """In words, how the model's weights are others than those of a mark; "" where they are the same, or it is no mark."""
    if not isinstance(told, Mapping) or not told or not all(isinstance(v, int | float) for v in told.values()):
        return ""
    here = own_state(model)
    missing = sorted(k for k in told if k not in here)
    if missing:
        return f"it was made on a network with {missing[0]}, which this one has not"
    off = [k for k, v in told.items() if not _near(float(here[k].flatten()[here[k].numel() // 2]), float(v))]
    if len(off) <= (1 - SHARE) * len(told):
        return ""
    return f"{len(off)} of {len(told)} weights that were looked at are others, such as {sorted(off)[0]}"


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= NEAR * max(abs(a), abs(b)) + 1e-6
