"""diffusers' SanaTransformer2DModel: flow in DC-AE latents with linear attention (arXiv 2410.10629, 2503.09641)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.wrappers.base import Wrapper, doubled, first_half, numbered, wraps
from fewstep.networks.wrappers.pixart import masked, masked_arguments


@wraps("SanaTransformer2DModel")
class Sana(Wrapper):
    """Wraps a SanaTransformer2DModel; taps "block0".. (tokens). One that takes a guidance scale is SANA-Sprint's."""

    needs = ("text",)
    takes = ("mask", "guidance")
    pipeline = "SanaPipeline"
    levels = "sigmas"

    def __init__(self, model: nn.Module, classes: int = 0, **options: Any) -> None:
        super().__init__(model, 0, **options)
        self.factor = self.config.timestep_scale
        if self.takes_scale:  # SANA-Sprint, whose scheduler wants to be told that there is no middle step
            self.pipeline, self.levels, self.factor = "SanaSprintPipeline", "", 1.0  # type: ignore[misc]
            self.plain = {**self.plain, "intermediate_timesteps": None}  # type: ignore[misc]

    @property
    def width(self) -> int:
        return int(self.model.proj_out.in_features)

    def embedders(self) -> list[nn.Module]:
        embed = self.model.time_embed
        return [embed.timestep_embedder] if self.config.guidance_embeds else [embed.emb]

    def blocks(self) -> dict[str, nn.Module]:
        return numbered("block", self.model.transformer_blocks)

    def call(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        scale = self.scale_of(cond, x)
        raw = self.model(
            x,
            encoder_hidden_states=cond["text"],
            timestep=time * self.factor,
            guidance=None if scale is None else scale * self.config.guidance_embeds_scale,
            encoder_attention_mask=cond.get("mask"),
            return_dict=False,
        )[0]
        return first_half(raw, x.shape[1])

    def own(self, raw: Tensor) -> Tensor:
        return doubled(raw, self.model)

    def example(self, b: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        cond = masked(b, 7, self.config.caption_channels, generator)
        return cond | ({"guidance": torch.full((b,), 4.5)} if self.config.guidance_embeds else {})

    def arguments(self, cond: Mapping[str, Tensor], size: tuple[int, ...]) -> dict[str, Any]:
        out = masked_arguments(cond)
        if self.takes_scale:
            out["guidance_scale"] = float(cond["guidance"][0] if "guidance" in cond else self.guidance)  # type: ignore[arg-type]
        return out
