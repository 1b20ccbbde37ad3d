"""What diffusers' UNets have in common."""

from __future__ import annotations

from torch import nn

from fewstep.networks.wrappers.base import Wrapper, numbered


class UNet(Wrapper):
    """A UNet's place in a pipeline, its time embedding and its taps "mid", "down0".., "up0".. (maps (b, c, h, w))."""

    component = "unet"

    @property
    def width(self) -> int:
        return int(self.model.time_embedding.linear_2.out_features)

    def embedders(self) -> list[nn.Module]:
        return [self.model.time_embedding]

    def blocks(self) -> dict[str, nn.Module]:
        m = self.model
        return {"mid": m.mid_block} | numbered("down", m.down_blocks) | numbered("up", m.up_blocks)
