"""Scalar inputs of a network beside its time: where a jump ends, guidance, the mirrored side of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.algebra.process import Process, angle_of

Input = Literal["s", "w", "mirror"]

ANGLE: dict[str, Callable[[Process, Tensor], Tensor]] = {
    "s": angle_of,
    "w": lambda p, w: torch.atan(w),
    "mirror": lambda p, m: m * (math.pi / 2),
}
"""Each input as an angle in [0, pi/2]: s destination time, w guidance scale, mirror 0 or 1 (TwinFlow's sign)."""


class Fourier(nn.Module):
    """Sines and cosines of 2 k angle, k = 1..count, for an angle in [0, pi/2]; then a linear layer."""

    frequency: Tensor

    def __init__(self, width: int, count: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequency", 2.0 * torch.arange(1, count + 1))
        self.linear = nn.Linear(2 * count, width)

    def forward(self, angle: Tensor) -> Tensor:
        phase = angle[:, None].to(self.linear.weight.dtype) * self.frequency
        return self.linear(torch.cat((phase.sin(), phase.cos()), -1))


class Extras(nn.ModuleDict):
    """One embedding (b,) -> (b, width) per further input; each starts at zero, so a copied network is unchanged."""

    def __init__(self, width: int, names: tuple[str, ...] = (), count: int = 16) -> None:
        super().__init__()
        self.width, self.count = width, count
        self.add(names)

    def add(self, names: tuple[str, ...]) -> None:
        """Further inputs, keys of ANGLE. Raises ValueError for an unknown one."""
        for name in names:
            if name not in ANGLE:
                raise ValueError(f"inputs {name!r} is not one of {', '.join(ANGLE)}")
            if name not in self:
                self[name] = made = Fourier(self.width, self.count)
                nn.init.zeros_(made.linear.weight)
                nn.init.zeros_(made.linear.bias)

    def embed(self, angles: Mapping[str, Tensor] | None) -> Tensor | float:
        """The sum of all embeddings, 0.0 without inputs. Raises ValueError when one is missing or unknown."""
        given = angles or {}
        if set(given) != set(self.keys()):
            wanted = ", ".join(self.keys()) or "none"
            raise ValueError(
                f"this network takes the inputs {wanted}; it was given {', '.join(given) or 'none'}"
            )
        return sum((self[name](angle) for name, angle in given.items()), 0.0)
