"""diffusers' UNet2DModel as a fewstep network: pixels or latents, with or without class labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    def refuses_size(self, size: Sequence[int]) -> str:
        # On the way up a side doubles: one that was halved with a remainder does not meet its own again.
        step = 2 ** (len(self.config.block_out_channels) - 1)
        return f"it halves sides, so they must be multiples of {step}" if any(n % step for n in size) else ""

    def example(self, b: int, generator: torch.Generator | None = None) -> Any:
        labels = torch.randint(self.classes, (b,), generator=generator) if self.classes else None
        if not self.image_channels:
            return labels
        return ({} if labels is None else {"label": labels}) | self.example_image(b, generator)
