"""diffusers' SD3Transformer2DModel: rectified flow in 16 latent channels (arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.wrappers.base import Wrapper, noise, numbered, wraps


@wraps("SD3Transformer2DModel")
class SD3(Wrapper):
    """Wraps an SD3Transformer2DModel; taps "block0".. (image tokens)."""

    needs = ("text", "pooled")
    pipeline = "StableDiffusion3Pipeline"
    levels = "sigmas"
    pick = 1

    @property
    def width(self) -> int:
        return int(self.model.inner_dim)

    def embedders(self) -> list[nn.Module]:
        return [self.model.time_text_embed]

    def blocks(self) -> dict[str, nn.Module]:
        return numbered("block", self.model.transformer_blocks)

    def call(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.model(x, cond["text"], cond["pooled"], time, return_dict=False)[0]

    def example(self, b: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        c = self.config
        return {
            "text": noise(generator, b, 7, c.joint_attention_dim),
            "pooled": noise(generator, b, c.pooled_projection_dim),
        }

    def arguments(self, cond: Mapping[str, Tensor], size: tuple[int, ...]) -> dict[str, Any]:
        return {"prompt_embeds": cond["text"], "pooled_prompt_embeds": cond["pooled"]}
