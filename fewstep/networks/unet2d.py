"""diffusers' UNet2DModel as a fewstep network: pixels or latents, with or without class labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.networks.wrappers.base import wraps
from fewstep.networks.wrappers.unet import UNet


@wraps("UNet2DModel")
class UNet2D(UNet):
    """Wraps a `diffusers.UNet2DModel`.

    Args:
        model: the module; class-conditional when it has `num_class_embeds`.
        classes: number of real classes; an embedding row beyond them is the null class. 0: unconditional.
    Taps: "mid", "down0".., "up0".. (activations (b, c, h, w)).
    """

    takes = ("label",)

    def call(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        if self.classes and "label" not in cond:
            raise ValueError("this UNet is class-conditional: cond is missing")
        labels = cond["label"] if self.classes else None
        return self.model(x, time, class_labels=labels, return_dict=False)[0]

    def example(self, b: int, generator: torch.Generator | None = None) -> Any:
        return torch.randint(self.classes, (b,), generator=generator) if self.classes else None
