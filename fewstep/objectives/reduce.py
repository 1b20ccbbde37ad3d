"""Means over the samples of all processes, for weights that are normalised over a batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def _summed(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


@torch.no_grad()
def everywhere(x: Tensor) -> Tensor:
    """The rows of x (b, *d) of all processes, each of which has as many, in their order: (processes b, *d)."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


@torch.no_grad()
def global_mean(x: Tensor) -> Tensor:
    """The mean of x (b,) over this micro-batch of all processes, a scalar without gradient."""
    total = _summed(torch.stack((x.sum().double(), torch.tensor(float(x.numel()), device=x.device).double())))
    return (total[0] / total[1]).to(x.dtype)


@torch.no_grad()
def bin_means(x: Tensor, place: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Means float64 (bins,) of x (b,) grouped by place int64 (b,), over all processes, and which bins were seen."""
    sums = torch.zeros(2, bins, dtype=torch.float64, device=x.device)
    sums[0].index_add_(0, place, x.double())
    sums[1].index_add_(0, place, torch.ones_like(x, dtype=torch.float64))
    sums = _summed(sums)
    return sums[0] / sums[1].clamp_min(1), sums[1] > 0
