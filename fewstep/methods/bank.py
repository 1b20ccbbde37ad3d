"""Trajectories in progress, kept between updates: STD's bank (arXiv 2412.18945)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Bank(nn.Module):
    """`slots` trajectories in progress: the state x, its knot (0: empty) and its class (-1: none)."""

    def __init__(self, slots: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.x: Tensor
        self.knot: Tensor
        self.label: Tensor
        self.register_buffer("x", torch.zeros(slots, *shape))
        self.register_buffer("knot", torch.zeros(slots, dtype=torch.long))
        self.register_buffer("label", torch.full((slots,), -1))

    def put(self, slot: Tensor, x: Tensor, knot: Tensor, label: Tensor | None) -> None:
        """Store states; of several for one slot the last counts. A state at knot 1 or below has ended."""
        done = knot <= 1
        self.x[slot], self.knot[slot] = (
            x.detach().to(self.x.dtype),
            torch.where(done, torch.zeros_like(knot), knot),
        )
        if label is not None:
            self.label[slot] = label
