"""Stable Diffusion 3, Flux, PixArt, SANA and SANA-Video as entries of `Declared`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fewstep.networks.wrappers.base import wraps
from fewstep.networks.wrappers.declared import Declared
from fewstep.networks.wrappers.packing import places

POOLED = {"text": "encoder_hidden_states", "pooled": "pooled_projections"}
POOLED_ASKS = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
POOLED_WIDTHS = {"text": "joint_attention_dim", "pooled": "pooled_projection_dim"}


@wraps("SD3Transformer2DModel")
class SD3(Declared):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

    pipeline, even, pick = "StableDiffusion3Pipeline", False, 1
    needs = ("text", "pooled")
    names, asks, widths = POOLED, POOLED_ASKS, POOLED_WIDTHS
    embedder = "time_text_embed"
    made_for, patch = (), 0


@wraps("FluxTransformer2DModel")
class Flux(Declared):
    """Flux.1 dev and schnell: packed latents, rotary positions, the guidance scale an input of dev's network."""

    pipeline, clock, packed, pick = "FluxPipeline", "t", True, 1
    needs, takes = ("text", "pooled"), ("guidance",)
    names, asks, widths = POOLED, POOLED_ASKS, POOLED_WIDTHS
    stacks = {"block": "transformer_blocks", "single": "single_transformer_blocks"}
    embedder, embedded, cfg = "time_text_embed", 3.5, "true_cfg_scale"

    def more(self, x: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        text = x.new_zeros(cond["text"].shape[1], 3)
        return {"img_ids": places(x), "txt_ids": text, "guidance": self.scale_of(cond, x)}


class Masked(Declared):
    """What PixArt and SANA have in common: the text's mask, sizes by the config, a learned variance in some."""

    even, variance = False, True
    names = {"text": "encoder_hidden_states", "mask": "encoder_attention_mask"}
    asks = {"text": "prompt_embeds", "mask": "prompt_attention_mask"}
    made_for: ClassVar[tuple[int, ...]] = ()
    patch = 0

    def arguments(self, cond: Mapping[str, Tensor], size: tuple[int, ...]) -> dict[str, Any]:
        whole = {"mask": cond["text"].new_ones(cond["text"].shape[:2]), **cond}
        return super().arguments(whole, size) | {"use_resolution_binning": False}


@wraps("PixArtTransformer2DModel")
class PixArt(Masked):
    """PixArt-alpha (with size conditions) and -sigma (arXiv 2310.00426, 2403.04692)."""

    pipeline, levels = "PixArtSigmaPipeline", "timesteps"
    takes = ("mask", "resolution", "aspect")
    widths = {"text": "caption_channels|cross_attention_dim", "mask": ""}
    embedder = "adaln_single.emb"

    def __init__(self, model: nn.Module, classes: int = 0, **options: Any) -> None:
        super().__init__(model, 0, **options)
        if self.model.use_additional_conditions:
            self.pipeline = "PixArtAlphaPipeline"  # type: ignore[misc]

    def more(self, x: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            h, w = self.pixels * x.shape[2], self.pixels * x.shape[3]
            size, ratio = x.new_tensor([h, w]).expand(len(x), 2), x.new_full((len(x), 1), h / w)
            added = {"resolution": cond.get("resolution", size), "aspect_ratio": cond.get("aspect", ratio)}
        return {"added_cond_kwargs": added}


@wraps("SanaTransformer2DModel")
class Sana(Masked):
    """SANA: flow in DC-AE latents (arXiv 2410.10629, 2503.09641); one that takes a guidance scale is SANA-Sprint's."""

    pipeline = "SanaPipeline"
    takes = ("mask", "guidance")
    widths = {"text": "caption_channels", "mask": ""}
    embedder, embedded = "time_embed.emb", 4.5

    def __init__(self, model: nn.Module, classes: int = 0, **options: Any) -> None:
        if model.config.guidance_embeds:  # type: ignore[union-attr]
            # The scheduler of Sprint's pipeline wants to be told that there is no middle step.
            self.pipeline, self.levels, self.cfg = "SanaSprintPipeline", "", ""  # type: ignore[misc]
            self.plain = {**self.plain, "intermediate_timesteps": None}  # type: ignore[misc]
            self.embedder = "time_embed.timestep_embedder"  # type: ignore[misc]
        super().__init__(model, 0, **options)

    def time(self, time: Tensor) -> Tensor:
        return time if self.takes_scale else time * self.config.timestep_scale

    def more(self, x: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        scale = self.scale_of(cond, x)
        return {"guidance": None if scale is None else scale * self.config.guidance_embeds_scale}


@wraps("SanaVideoTransformer3DModel")
class SanaVideo(Masked):
    """SANA-Video, text to video (arXiv 2509.24695). x (b, c, f, h, w) of Wan's VAE, four frames to one of x."""

    pipeline = "SanaVideoPipeline"
    takes = ("mask",)
    widths = {"text": "caption_channels", "mask": ""}
    embedder = "time_embed.emb"
    made_for, patch = (21, 60, 104), 2

    def tokens(self, size: tuple[int, ...]) -> int:
        return size[0] * super().tokens(size)

    def of_size(self, size: tuple[int, ...]) -> dict[str, Any]:
        return {"frames": 4 * (size[0] - 1) + 1}
