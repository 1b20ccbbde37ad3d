"""Scalar inputs of a network beside its time: where a jump ends, guidance, the mirrored side of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.algebra.noising import angle_of
from fewstep.algebra.process import Process

Input = Literal["s", "length", "w", "mirror"]

ANGLE: dict[str, Callable[[Process, Tensor], Tensor]] = {
    "s": angle_of,
    "length": lambda p, h: h,
    "w": lambda p, w: torch.atan(w),
    "mirror": lambda p, m: m * (math.pi / 2),
}
"""Each input as an angle in [0, pi/2]: s destination time, length of the jump (the difference of the angles of t and
s, which MeanFlow and shortcut models feed in place of s), w guidance scale, mirror 0 or 1 (TwinFlow's sign)."""


def values_of(
    process: Process,
    inputs: Sequence[str],
    t: Tensor,
    s: Tensor | None,
    w: Tensor | None,
    mirror: Tensor | None,
) -> dict[str, Tensor]:
    """What a network with these inputs is given, (b,) each; left out, s is t (the instantaneous denoiser)."""
    end = t if s is None else s
    known: dict[str, Callable[[], Tensor]] = {
        "s": lambda: end,
        "length": lambda: angle_of(process, t) - angle_of(process, end),
        "w": lambda: torch.ones_like(t) if w is None else w,
        "mirror": lambda: torch.zeros_like(t) if mirror is None else mirror,
    }
    return {n: known[n]() for n in inputs}


def goes_to(inputs: Sequence[str]) -> bool:
    """Whether these inputs tell a network where its jump ends."""
    return "s" in inputs or "length" in inputs


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
            raise ValueError(f"this network takes the inputs {wanted}; it was given {', '.join(given) or 'none'}")
        return sum((self[name](angle) for name, angle in given.items()), 0.0)
