"""A small MLP for vectors: the toy student and critic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.networks.extras import Extras, Fourier


class Residual(nn.Module):
    """h + down(act(up(h) + shift(embedding))); `down` starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.shift, self.down = (nn.Linear(width, width) for _ in range(3))
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return h + self.down(F.silu(self.up(h) + self.shift(embedding)))


class MLP(nn.Module):
    """depth hidden layers of one width; time enters through every layer, classes through an embedding.

    Args:
        dim: of x.
        width, depth: of the hidden layers.
        classes: number of classes, 0 for none; class index `classes` is the null class.
        inputs: scalar inputs beside the time, see fewstep.networks.extras.
        frequencies: sines and cosines of 2 k angle, k = 1..frequencies, by which the time and each input enter.
        residual: the layers after the first are residual blocks, a list `blocks` that pruning can shorten.
    Tap: "mid", the activation of the middle layer, (b, width).
    """

    def __init__(
        self,
        dim: int = 2,
        width: int = 192,
        depth: int = 5,
        classes: int = 0,
        inputs: tuple[str, ...] = (),
        frequencies: int = 16,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.first = nn.Linear(dim, width)
        self.time = Fourier(width, frequencies)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        plain = 0 if residual else depth - 1
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(plain))
        self.shift = nn.ModuleList(nn.Linear(width, width) for _ in range(plain))
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth - 1 - plain))
        self.last = nn.Linear(width, dim)
        self.act = nn.SiLU()
        self.extras = Extras(width, inputs, frequencies)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        cond: Any = None,
        *,
        taps: Sequence[str] = (),
        stop: bool = False,
        extras: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """x (b, dim), time (b,) an angle in [0, pi/2], cond int (b,) or None -> (raw (b, dim), features)."""
        unknown = set(taps) - {"mid"}
        if unknown:
            raise ValueError(f"taps {sorted(unknown)} are unknown to MLP; allowed: mid")
        embedding = self.time(time) + self.extras.embed(extras)
        if self.label is not None and cond is not None:
            embedding = embedding + self.label(cond)
        embedding = self.act(embedding)
        h = self.act(self.first(x))
        features: dict[str, Tensor] = {}
        for i, (layer, shift) in enumerate(zip(self.layers, self.shift, strict=True)):
            h = self.act(layer(h) + shift(embedding))
            if i == len(self.layers) // 2 and "mid" in taps:
                features["mid"] = h
                if stop:
                    return None, features
        for i, block in enumerate(self.blocks):
            h = block(h, embedding)
            if i == len(self.blocks) // 2 and "mid" in taps:
                features["mid"] = h
                if stop:
                    return None, features
        return self.last(h), features
