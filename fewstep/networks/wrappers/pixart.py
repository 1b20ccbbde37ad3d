"""diffusers' PixArtTransformer2DModel: PixArt-alpha (with size conditions) and -sigma (arXiv 2310.00426, 2403.04692)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.wrappers.base import Wrapper, doubled, first_half, noise, numbered, wraps


@wraps("PixArtTransformer2DModel")
class PixArt(Wrapper):
    """Wraps a PixArtTransformer2DModel; taps "block0".. (tokens)."""

    needs = ("text",)
    takes = ("mask", "resolution", "aspect")
    pipeline = "PixArtSigmaPipeline"

    def __init__(self, model: nn.Module, classes: int = 0, **options: Any) -> None:
        super().__init__(model, 0, **options)
        if self.model.use_additional_conditions:
            self.pipeline = "PixArtAlphaPipeline"  # type: ignore[misc]

    @property
    def width(self) -> int:
        return int(self.model.inner_dim)

    def embedders(self) -> list[nn.Module]:
        return [self.model.adaln_single.emb]

    def blocks(self) -> dict[str, nn.Module]:
        return numbered("block", self.model.transformer_blocks)

    def call(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            h, w = self.pixels * x.shape[2], self.pixels * x.shape[3]
            size, ratio = x.new_tensor([h, w]).expand(len(x), 2), x.new_full((len(x), 1), h / w)
            added = {"resolution": cond.get("resolution", size), "aspect_ratio": cond.get("aspect", ratio)}
        raw = self.model(
            x,
            encoder_hidden_states=cond["text"],
            timestep=time,
            added_cond_kwargs=added,
            encoder_attention_mask=cond.get("mask"),
            return_dict=False,
        )[0]
        return first_half(raw, x.shape[1])

    def own(self, raw: Tensor) -> Tensor:
        return doubled(raw, self.model)

    def example(self, b: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return masked(b, 7, self.config.caption_channels or self.config.cross_attention_dim, generator)

    def arguments(self, cond: Mapping[str, Tensor], size: tuple[int, ...]) -> dict[str, Any]:
        return masked_arguments(cond)


def masked(b: int, n: int, width: int, generator: torch.Generator | None) -> dict[str, Tensor]:
    """Random token embeddings whose last rows are padding, a different number in each sample."""
    mask = (torch.arange(n) < n - torch.arange(b)[:, None] % 3).float()
    return {"text": noise(generator, b, n, width), "mask": mask}


def masked_arguments(cond: Mapping[str, Tensor]) -> dict[str, Any]:
    """Text and mask as the PixArt and SANA pipelines take them."""
    text = cond["text"]
    mask = cond.get("mask", text.new_ones(text.shape[:2]))
    return {"prompt_embeds": text, "prompt_attention_mask": mask, "use_resolution_binning": False}
