"""What diffusers' UNets have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.picture import parted
from fewstep.networks.wrappers.base import Wrapper, noise, numbered


class UNet(Wrapper):
    """A UNet's place in a pipeline, its time embedding and its taps "mid", "down0".., "up0".. (maps (b, c, h, w)).

    Input channels beyond those of its answer are a picture's, cond["image"].
    """

    component = "unet"

    def __init__(self, model: nn.Module, classes: int = 0, **options: Any) -> None:
        super().__init__(model, classes, **options)
        sides = [getattr(self.config, f"{k}_channels", None) for k in ("in", "out")]
        if all(isinstance(n, int) for n in sides) and sides[0] > sides[1]:  # type: ignore[operator]
            self.model.conv_in, self.picture = parted(self.model.conv_in, sides[1])  # type: ignore[arg-type]
            self.model.register_to_config(in_channels=sides[1])

    def first(self) -> Any:
        return self.model.conv_in

    def example_image(self, b: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """A random picture of x's size."""
        return {"image": noise(generator, b, self.image_channels, *self.sample_size())} if self.image_channels else {}

    @property
    def width(self) -> int:
        return int(self.model.time_embedding.linear_2.out_features)

    def embedders(self) -> list[nn.Module]:
        return [self.model.time_embedding]

    def blocks(self) -> dict[str, nn.Module]:
        m = self.model
        return {"mid": m.mid_block} | numbered("down", m.down_blocks) | numbered("up", m.up_blocks)
