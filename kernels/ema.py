"""Exponential moving average of parameters, one foreach call for all of them."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(average: Iterable[Tensor], current: Iterable[Tensor], decay: float) -> None:
    """average <- decay average + (1 - decay) current, in place, for lists of equal length and shapes.

    Averages may have a wider dtype than the parameters (fp32 averages of bf16 parameters) and keep it.
    Raises ValueError for a decay outside [0, 1], lists that differ in length, or shapes or devices that
    differ; nothing is changed then.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay: must be in [0, 1], got {decay}")
    averages, parameters = list(average), [p.detach() for p in current]
    if len(averages) != len(parameters):
        raise ValueError(f"current: {len(averages)} tensors expected as in average, got {len(parameters)}")
    for i, (a, p) in enumerate(zip(averages, parameters, strict=True)):
        if a.shape != p.shape or a.device != p.device:
            raise ValueError(
                f"current[{i}]: expected shape {tuple(a.shape)} on {a.device} as in average, "
                f"got {tuple(p.shape)} on {p.device}"
            )
    if averages:
        matched = [p.to(a.dtype) for a, p in zip(averages, parameters, strict=True)]
        torch._foreach_lerp_(averages, matched, 1.0 - decay)
