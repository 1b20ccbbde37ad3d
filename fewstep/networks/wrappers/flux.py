"""diffusers' FluxTransformer2DModel: packed latents, rotary positions, embedded guidance (Flux.1 dev, schnell)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.wrappers.base import Wrapper, noise, numbered, wraps


def pack(x: Tensor) -> Tensor:
    """(b, c, h, w) -> tokens (b, h/2 w/2, 4c) of 2 x 2 latents; h and w even."""
    b, c, h, w = x.shape
    if h % 2 or w % 2:
        raise ValueError(f"latents are packed 2 x 2, so height and width must be even, not {h} x {w}")
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, size: tuple[int, ...]) -> Tensor:
    """The inverse of `pack` for latents of height and width `size`."""
    h, w = size
    b, _, c = tokens.shape
    return tokens.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


@wraps("FluxTransformer2DModel")
class Flux(Wrapper):
    """Wraps a FluxTransformer2DModel on unpacked latents; taps "block0".., "single0".. (image tokens)."""

    needs = ("text", "pooled")
    takes = ("guidance",)
    pipeline = "FluxPipeline"
    levels = "sigmas"
    even = True
    pick = 1

    @property
    def width(self) -> int:
        return int(self.model.inner_dim)

    def embedders(self) -> list[nn.Module]:
        return [self.model.time_text_embed]

    def blocks(self) -> dict[str, nn.Module]:
        m = self.model
        return numbered("block", m.transformer_blocks) | numbered("single", m.single_transformer_blocks)

    def sample_size(self) -> tuple[int, ...]:
        return 128, 128  # the config has none; FluxPipeline's default is 1024 x 1024 pixels

    def small_size(self) -> tuple[int, ...]:
        return 16, 24

    def channels(self) -> int:
        return int(self.config.in_channels) // 4

    def tokens(self, size: tuple[int, ...]) -> int:
        return size[0] * size[1] // 4

    def call(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        _, _, h, w = x.shape
        places = torch.zeros(h // 2, w // 2, 3, device=x.device, dtype=x.dtype)
        places[..., 1] = torch.arange(h // 2, device=x.device, dtype=x.dtype)[:, None]
        places[..., 2] = torch.arange(w // 2, device=x.device, dtype=x.dtype)
        raw = self.model(
            hidden_states=pack(x),
            encoder_hidden_states=cond["text"],
            pooled_projections=cond["pooled"],
            timestep=time / 1000,  # the model multiplies it back
            img_ids=places.reshape(-1, 3),
            txt_ids=x.new_zeros(cond["text"].shape[1], 3),
            guidance=self.scale_of(cond, x),
            return_dict=False,
        )[0]
        return unpack(raw, (h, w))

    def own(self, raw: Tensor) -> Tensor:
        return pack(raw)

    def example(self, b: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        c = self.config
        cond = {
            "text": noise(generator, b, 7, c.joint_attention_dim),
            "pooled": noise(generator, b, c.pooled_projection_dim),
        }
        return cond | ({"guidance": torch.full((b,), 3.5)} if c.guidance_embeds else {})

    def arguments(self, cond: Mapping[str, Tensor], size: tuple[int, ...]) -> dict[str, Any]:
        out: dict[str, Any] = {"prompt_embeds": cond["text"], "pooled_prompt_embeds": cond["pooled"]}
        if self.config.guidance_embeds:
            scale = cond["guidance"][0] if "guidance" in cond else self.guidance
            out["guidance_scale"] = float(scale)  # type: ignore[arg-type]
        return out

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def from_pipeline(self, latents: Tensor, size: tuple[int, ...]) -> Tensor:
        return unpack(latents, size)
