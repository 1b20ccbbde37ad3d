"""The tables of DDPM (arXiv 2006.11239) and of Stable Diffusion (arXiv 2112.10752)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def log_ratio_table(schedule: str, start: float, end: float, steps: int) -> Tensor:
    """log(sigma / alpha) at each index, float64 (steps,), of a linear or scaled_linear table of betas."""
    if schedule == "linear":
        beta = torch.linspace(start, end, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        beta = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    else:
        raise ValueError(f"schedule {schedule!r} is not one of 'linear', 'scaled_linear'")
    log_alpha_bar = torch.log1p(-beta).cumsum(0)
    return 0.5 * (torch.log(-torch.expm1(log_alpha_bar)) - log_alpha_bar)
