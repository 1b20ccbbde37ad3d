"""A diffusers network without its fastest time features, for methods that differentiate in the time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def _embeddings(net: nn.Module) -> Iterator[tuple[nn.Module, nn.Linear]]:
    """Sinusoids of the time, each with the linear layer that reads them."""
    for module in net.modules():
        sinusoids = getattr(module, "time_proj", None)
        reader = getattr(module, "time_embedding", None) or getattr(module, "timestep_embedder", None)
        first = getattr(reader, "linear_1", None)
        if hasattr(sinusoids, "downscale_freq_shift") and isinstance(first, nn.Linear):
            yield sinusoids, first  # type: ignore[misc]


def slow_time(net: nn.Module, fastest: float) -> int:
    """Set the weights of faster time sinusoids to 0 and keep them there; the number of frequencies cut.

    A tangent grows with the frequency of every feature that is used, however little it changes the output; sCM
    trains on slow features only for this reason (arXiv 2410.11081, sec. 4.1). A sinusoid's mean over times is 0,
    so cutting it leaves the mean answer as it is. No other layer changes: the network exports as before.

    Args:
        fastest: largest frequency kept, in radians per unit of the network's own time input (diffusers: 1 to 1e-4).

    Raises ValueError when the network has no such sinusoids, or none as slow.
    """
    found: list[tuple[Any, Any]] = list(_embeddings(net))
    cut = 0
    if not found:
        raise ValueError("it has no sinusoidal time embedding of diffusers")
    for sinusoids, first in found:
        half = first.in_features // 2
        steps = torch.arange(half, dtype=torch.float64) / (half - float(sinusoids.downscale_freq_shift))
        frequency = torch.exp(-math.log(10_000) * steps) * float(getattr(sinusoids, "scale", 1))
        keep = frequency <= fastest
        if not bool(keep.any()):
            raise ValueError(f"its slowest time feature has frequency {float(frequency.min()):.3g}")
        cut += int((~keep).sum())
        _hold(first.weight, torch.cat((keep, keep)))
    return cut


def _hold(weight: Tensor, keep: Tensor) -> None:
    """Zero columns (n, k) outside keep (k,) and their gradients."""
    mask = keep.to(weight)
    with torch.no_grad():
        weight.mul_(mask)
    # Adam turns gradients of any size into full steps, so noise alone would bring the columns back.
    weight.requires_grad_(True).register_hook(lambda g: g * mask.to(g))
