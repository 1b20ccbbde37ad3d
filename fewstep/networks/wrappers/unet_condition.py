"""diffusers' UNet2DConditionModel: SD1.x, SD2.x (eps or v), SDXL with its added conditions (arXiv 2307.01952), IF's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.config import UserError
from fewstep.networks.wrappers.base import noise, wraps
from fewstep.networks.wrappers.unet import UNet


@wraps("UNet2DConditionModel")
class UNetCondition(UNet):
    """Wraps a UNet2DConditionModel; taps "mid", "down0".., "up0".. (activations (b, c, h, w))."""

    needs: ClassVar[tuple[str, ...]] = ("text",)
    takes: ClassVar[tuple[str, ...]] = ("pooled", "time_ids")

    def __init__(self, model: nn.Module, classes: int = 0, **options: Any) -> None:
        super().__init__(model, 0, **options)
        c = self.config
        for key, allowed in (
            ("addition_embed_type", (None, "text_time", "text")),
            ("class_embed_type", (None,)),
        ):
            if getattr(c, key, None) not in allowed:
                raise UserError(
                    f"UNet2DConditionModel: {key} {getattr(c, key)!r} is not supported; allowed: "
                    + ", ".join(map(repr, allowed))
                )
        if c.num_class_embeds:
            raise UserError("UNet2DConditionModel: num_class_embeds is set, which is not supported for a teacher")
        if self.takes_scale:
            self.takes, self.cfg = (*self.takes, "guidance"), ""  # type: ignore[misc]
        self.added = c.addition_embed_type == "text_time"
        self.pipeline = "StableDiffusionXLPipeline" if self.added else "StableDiffusionPipeline"  # type: ignore[misc]
        if self.added:
            self.needs = ("text", "pooled")  # type: ignore[misc]
        if c.addition_embed_type == "text":
            self.pipeline = "IFPipeline"  # type: ignore[misc]
            self._without_text()

    def add_image(self, channels: int) -> None:
        super().add_image(channels)
        self._without_text()

    def _without_text(self) -> None:
        """A network of pixels that takes a picture may go without words: one token of zeros stands for them."""
        if self.image_channels and self.config.addition_embed_type == "text":
            self.pipeline = "IFSuperResolutionPipeline"  # type: ignore[misc]
            self.needs, self.takes = (), ("text",)  # type: ignore[misc]

    def words(self, cond: Mapping[str, Tensor], b: int) -> Tensor:
        """cond["text"], or one token of zeros (b, 1, d) where it may be without."""
        if "text" in cond:
            return cond["text"]
        weight = self.model.conv_in.weight
        return torch.zeros(b, 1, self.config.encoder_hid_dim, device=weight.device, dtype=weight.dtype)

    def call(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.model(x, time, self.words(cond, len(x)), **self.given(x, cond), return_dict=False)[0]

    def given(self, x: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the model is told beside x, time and words."""
        added = None
        if self.added:
            ids = cond["time_ids"] if "time_ids" in cond else self.default_ids(x)
            added = {"text_embeds": cond["pooled"], "time_ids": ids}
        scale = self.scale_of(cond, x)
        scale = None if scale is None else waves(scale - 1, self.config.time_cond_proj_dim).to(x.dtype)
        return {"timestep_cond": scale, "added_cond_kwargs": added}

    @property
    def takes_scale(self) -> bool:
        """True of a latent consistency model (arXiv 2310.04378), whose guidance is an input."""
        return self.config.time_cond_proj_dim is not None

    def default_ids(self, x: Tensor) -> Tensor:
        """Sizes of an uncropped image (b, 6): what the pipeline fills in when nothing is said."""
        h, w = self.pixels * x.shape[2], self.pixels * x.shape[3]
        return torch.tensor([h, w, 0, 0, h, w], device=x.device, dtype=x.dtype).expand(x.shape[0], 6)

    def example(self, b: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        c = self.config
        wide = c.encoder_hid_dim or c.cross_attention_dim
        cond = {"text": noise(generator, b, 7, wide if isinstance(wide, int) else wide[0])} if self.needs else {}
        cond |= self.example_image(b, generator)
        if self.added:
            pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
            cond["pooled"] = noise(generator, b, pooled)
        return cond | ({"guidance": torch.full((b,), 7.5)} if self.takes_scale else {})

    def arguments(self, cond: Mapping[str, Tensor], size: tuple[int, ...]) -> dict[str, Any]:
        out: dict[str, Any] = {"prompt_embeds": self.words(cond, len(next(iter(cond.values()))))}
        if self.image_channels:
            out["image"] = cond["image"]
        if self.takes_scale:
            out["guidance_scale"] = float(cond["guidance"][0] if "guidance" in cond else self.guidance)  # type: ignore[arg-type]
        if self.added:
            out["pooled_prompt_embeds"] = cond["pooled"]
            if "time_ids" in cond:
                h, w, top, left, high, wide = (int(v) for v in cond["time_ids"][0])
                out |= {
                    "original_size": (h, w),
                    "crops_coords_top_left": (top, left),
                    "target_size": (high, wide),
                }
        return out


def waves(w: Tensor, width: int) -> Tensor:
    """Sines and cosines (b, width) of 1000 w (b,) at frequencies from 1 to 1e-4: how LCM hands a scale to its UNet."""
    half = width // 2
    angles = 1000 * w[:, None] * torch.exp(torch.arange(half, device=w.device) * (-math.log(10_000) / (half - 1)))
    return nn.functional.pad(torch.cat((angles.sin(), angles.cos()), 1), (0, width % 2))
