"""The tables of DDPM (arXiv 2006.11239), of Stable Diffusion (arXiv 2112.10752) and their descendants."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

MOST = math.log(1e7)
"""log(sigma / alpha) that stands for pure noise: alpha is 1e-7 then, and its angle still apart from pi / 2 in float32."""


@lru_cache(maxsize=32)
def log_ratio_table(
    schedule: str,
    start: float,
    end: float,
    steps: int,
    zero_snr: bool = False,
    snr_shift: float = 1.0,
    betas: tuple[float, ...] | None = None,
) -> Tensor:
    """log(sigma / alpha) at each index, float64 (steps,).

    Args:
        schedule: what beta runs along: linear, scaled_linear or squaredcos_cap_v2 (arXiv 2102.09672, eq. 17).
        start, end: the first and the last beta of the first two.
        zero_snr: alpha is moved and scaled so that the last index is pure noise (arXiv 2305.08891, alg. 1).
        snr_shift: what alpha^2 / sigma^2 is divided by before (CogVideoX, arXiv 2408.06072).
        betas: (steps,) in place of a schedule.
    """
    if betas is not None:
        beta = torch.tensor(betas, dtype=torch.float64)
    elif schedule == "linear":
        beta = torch.linspace(start, end, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        beta = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    elif schedule == "squaredcos_cap_v2":
        bar = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - bar[1:] / bar[:-1]).clamp_max(0.999)
    else:
        raise ValueError(f"schedule {schedule!r} is not one of 'linear', 'scaled_linear', 'squaredcos_cap_v2'")
    log_alpha_bar = torch.log1p(-beta).cumsum(0)
    table = 0.5 * (torch.log(-torch.expm1(log_alpha_bar)) - log_alpha_bar)
    if snr_shift != 1.0:
        table = table + 0.5 * math.log(snr_shift)
    if zero_snr:
        alpha = torch.sigmoid(-2 * table).sqrt()
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        table = 0.5 * torch.log(1 - alpha**2) - torch.log(alpha)
    return table.clamp_max(MOST)


def check_betas(betas: tuple[float, ...], steps: int) -> None:
    """ValueError, beginning with "betas:", for a table that is no noise schedule of so many steps."""
    if len(betas) != steps or not all(0 < b <= 1 for b in betas):
        raise ValueError(f"betas: needs a number above 0 and up to 1 for each of the {steps} steps")
    if bool((log_ratio_table("", 0.0, 0.0, steps, betas=betas).diff() <= 0).any()):
        raise ValueError("betas: pure noise is reached before the last index")
