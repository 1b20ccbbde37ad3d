"""Families of 2024 and later as entries of `Declared`, pictures and videos; `older.py` has those before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.process import bc
from fewstep.networks.folder import patches_of
from fewstep.networks.wrappers.base import wraps
from fewstep.networks.wrappers.declared import EXAMPLE_TOKENS, Declared
from fewstep.networks.wrappers.packing import pack, places, unpack


@wraps("ZImageTransformer2DModel")
class ZImage(Declared):
    """Z-Image (arXiv 2511.22699). Its pipeline counts guidance from 0: cond + w (cond - null)."""

    pipeline = "ZImagePipeline"
    x_name, time_name = "x", "t"
    clock, sign = "1-t", -1.0
    takes, cuts = ("mask",), True
    names = {}
    widths = {"text": "cap_feat_dim", "mask": ""}
    stacks = {"block": "layers"}
    embedder = "t_embedder"
    plain = {"guidance_scale": 0.0}

    def more(self, x: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"cap_feats": unpadded(cond)}

    def layout(self, x: Tensor) -> list[Tensor]:
        return list(x.unsqueeze(2).unbind(0))

    def image(self, answer: Any, x: Tensor) -> Tensor:
        return torch.stack(answer).squeeze(2)

    def arguments(self, cond: Mapping[str, Tensor], size: tuple[int, ...]) -> dict[str, Any]:
        return {"prompt_embeds": unpadded(cond)}

    def scale_of_pipeline(self, scale: float) -> float:
        return 1 + scale


def unpadded(cond: Mapping[str, Tensor]) -> list[Tensor]:
    """The tokens (n, d) of each sample without padding."""
    if "mask" not in cond:
        return list(cond["text"])
    return [text[mask.bool()] for text, mask in zip(cond["text"], cond["mask"], strict=True)]


@wraps("QwenImageTransformer2DModel")
class QwenImage(Declared):
    """Qwen-Image (arXiv 2508.02324). Its pipeline keeps each token of the guided answer at the conditional one's norm."""

    pipeline = "QwenImagePipeline"
    clock, packed, pick = "t", True, 1
    takes = ("mask", "guidance")
    names = {"text": "encoder_hidden_states", "mask": "encoder_hidden_states_mask"}
    asks = {"text": "prompt_embeds", "mask": "prompt_embeds_mask"}
    widths = {"text": "joint_attention_dim", "mask": ""}
    embedder = "time_text_embed.timestep_embedder"
    plain, cfg = {"true_cfg_scale": 1.0}, "true_cfg_scale"

    def more(self, x: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"img_shapes": [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x), "guidance": self.scale_of(cond, x)}

    def combine(self, cond: Tensor, null: Tensor, scale: float | Tensor) -> Tensor:
        w = bc(scale, cond) if isinstance(scale, Tensor) else scale
        own, mixed = pack(cond), pack(null + w * (cond - null))
        return unpack(mixed * (own.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)), cond.shape[2:])


@wraps("ChromaTransformer2DModel")
class Chroma(Declared):
    """Chroma (lodestones/Chroma1-HD): Flux without pooled text and guidance input, the text's mask over all tokens."""

    pipeline = "ChromaPipeline"
    clock, packed, pick = "t", True, 1
    takes = ("mask",)
    asks = {"text": "prompt_embeds", "mask": "prompt_attention_mask"}
    widths = {"text": "joint_attention_dim", "mask": ""}
    stacks = {"block": "transformer_blocks", "single": "single_transformer_blocks"}

    def more(self, x: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        out = {"img_ids": places(x), "txt_ids": x.new_zeros(cond["text"].shape[1], 3)}
        if "mask" not in cond:
            return out
        image = cond["mask"].new_ones(len(x), self.tokens(tuple(x.shape[2:])))
        return out | {"attention_mask": torch.cat((cond["mask"], image), 1)}


@wraps("Flux2Transformer2DModel")
class Flux2(Declared):
    """FLUX.2 dev, and klein where the model takes no guidance scale. x are whitened 2 x 2 patches of the VAE's codes."""

    pipeline = "Flux2Pipeline"
    clock, pick = "t", 1
    takes = ("guidance",)
    stacks = {"block": "transformer_blocks", "single": "single_transformer_blocks"}
    embedder = "time_guidance_embed.timestep_embedder"
    made_for, patch, embedded, cfg = (64, 64), 1, 4.0, ""

    def __init__(self, model: nn.Module, classes: int = 0, **options: Any) -> None:
        super().__init__(model, 0, **options)
        if not self.config.guidance_embeds:
            self.pipeline, self.cfg = "Flux2KleinPipeline", "guidance_scale"  # type: ignore[misc]

    def mu(self, config: Mapping[str, Any], tokens: int, where: str = "", steps: int | None = None) -> float:
        """Of 50 steps, the pipeline's own number, where none is told: linear in it up to 4300 tokens, then constant."""
        many = 0.00016927 * tokens + 0.45666666  # at 200 steps; figures of diffusers' compute_empirical_mu
        few = 8.73809524e-05 * tokens + 1.89833333  # at 10
        return many if tokens > 4300 else many + (many - few) * ((steps or 50) - 200) / 190

    def more(self, x: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        count = cond["text"].shape[1]
        axes = torch.arange(x.shape[2], device=x.device), torch.arange(x.shape[3], device=x.device)
        image = x.new_zeros(x.shape[2] * x.shape[3], 4)
        image[:, 1:3] = torch.cartesian_prod(*axes).to(x)
        text = x.new_zeros(count, 4)
        text[:, 3] = torch.arange(count, device=x.device).to(x)
        ids = {"img_ids": image.expand(len(x), -1, -1), "txt_ids": text.expand(len(x), -1, -1)}
        return ids | {"guidance": self.scale_of(cond, x)}

    def layout(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def image(self, answer: Any, x: Tensor) -> Tensor:
        return answer.transpose(1, 2).reshape(x.shape)

    def stepped(self, latents: Tensor) -> Tensor:
        return self.layout(latents)

    def unstepped(self, latents: Tensor, size: tuple[int, ...]) -> Tensor:
        return latents.transpose(1, 2).reshape(len(latents), -1, *size)

    def from_pipeline(self, latents: Tensor, size: tuple[int, ...]) -> Tensor:
        return self.unstepped(latents, size)

    def drawn(self, latents: Tensor, size: tuple[int, ...], pipe: Any) -> Tensor:
        """klein's pipeline has undone whitening and patches by then."""
        if self.config.guidance_embeds:
            return self.from_pipeline(latents, size)
        return patches_of(pipe.vae.config).of_weights(pipe.vae).encode(latents)


@wraps("WanTransformer3DModel")
class Wan(Declared):
    """Wan 2.1, text to video (arXiv 2503.20314). x (b, c, f, h, w): its VAE has four frames of the video to one of x."""

    pipeline = "WanPipeline"
    levels, even = "", False
    widths = {"text": "text_dim"}
    stacks = {"block": "blocks"}
    embedder = "condition_embedder.time_embedder"
    made_for = (21, 60, 104)

    def tokens(self, size: tuple[int, ...]) -> int:
        return size[0] * super().tokens(size)

    def of_size(self, size: tuple[int, ...]) -> dict[str, Any]:
        return {"num_frames": 4 * (size[0] - 1) + 1}


@wraps("AnyFlowTransformer3DModel")
class AnyFlow(Wan):
    """AnyFlow (arXiv 2605.13724): Wan with an embedding of the time r where a jump ends, asked here at r = t."""

    pipeline = "AnyFlowPipeline"
    levels = "sigmas"
    plain = {"guidance_scale": 1.0, "use_mean_velocity": False}

    def layout(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    def image(self, answer: Any, x: Tensor) -> Tensor:
        return answer.transpose(1, 2)

    def call(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        frames = time[:, None].expand(-1, x.shape[2])
        return self.image(self.model(self.layout(x), frames, frames, cond["text"], return_dict=False)[0], x)


@wraps("Lumina2Transformer2DModel")
class Lumina2(Declared):
    """Lumina-Image 2.0 (arXiv 2503.21758). Its pipeline keeps rows of the guided answer at the conditional one's norm."""

    pipeline = "Lumina2Pipeline"
    clock, sign = "1-t", -1.0
    needs = ("text", "mask")
    widths = {"text": "cap_feat_dim", "mask": ""}
    stacks = {"block": "layers"}
    embedder, counts = "time_caption_embed.timestep_embedder", "rope_embedder"

    def more(self, x: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"encoder_attention_mask": cond["mask"].bool()}

    def arguments(self, cond: Mapping[str, Tensor], size: tuple[int, ...]) -> dict[str, Any]:
        return {"prompt_embeds": cond["text"], "prompt_attention_mask": cond["mask"].bool()}

    def combine(self, cond: Tensor, null: Tensor, scale: float | Tensor) -> Tensor:
        w = bc(scale, cond) if isinstance(scale, Tensor) else scale
        mixed = null + w * (cond - null)
        return mixed * (cond.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))


@wraps("AuraFlowTransformer2DModel")
class AuraFlow(Declared):
    """AuraFlow (fal/AuraFlow-v0.3): its pipeline sets padding's embeddings to 0 and hands the network no mask."""

    pipeline, even, pick = "AuraFlowPipeline", False, 1
    clock = "t"
    stacks = {"block": "joint_transformer_blocks", "single": "single_transformer_blocks"}
    embedder = "time_step_proj"

    def arguments(self, cond: Mapping[str, Tensor], size: tuple[int, ...]) -> dict[str, Any]:
        return {"prompt_embeds": cond["text"], "prompt_attention_mask": cond["text"].new_ones(cond["text"].shape[:2])}


@wraps("OvisImageTransformer2DModel")
class OvisImage(Declared):
    """Ovis-Image: Flux's layout, with places for the text as well."""

    pipeline, clock, packed, pick = "OvisImagePipeline", "t", True, 1
    stacks = {"block": "transformer_blocks", "single": "single_transformer_blocks"}
    embedder = "timestep_embedder"

    def more(self, x: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        count = torch.arange(cond["text"].shape[1], device=x.device, dtype=x.dtype)
        return {"img_ids": places(x), "txt_ids": torch.stack((0 * count, count, count), 1)}


@wraps("Krea2Transformer2DModel")
class Krea2(Declared):
    """Krea 2: text (b, n, layers, d), guidance counted from 0 as Z-Image's. Turbo's constant shift is not read."""

    pipeline, clock, packed = "Krea2Pipeline", "t", True
    needs = ("text", "mask")
    embedder = "time_embed"
    plain = {"guidance_scale": 0.0}

    def more(self, x: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        text = x.new_zeros(cond["text"].shape[1], 3)
        return {"position_ids": torch.cat((text, places(x))), "encoder_attention_mask": cond["mask"].bool()}

    def example(self, b: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        c, n = self.config, EXAMPLE_TOKENS
        text = torch.randn(b, n, c.num_text_layers, c.text_hidden_dim, generator=generator)
        return {"text": text, "mask": (torch.arange(n) < n - torch.arange(b)[:, None] % 3).float()}

    def arguments(self, cond: Mapping[str, Tensor], size: tuple[int, ...]) -> dict[str, Any]:
        return {"prompt_embeds": cond["text"], "prompt_embeds_mask": cond["mask"].bool()}

    def scale_of_pipeline(self, scale: float) -> float:
        return 1 + scale


@wraps("HunyuanVideoTransformer3DModel")
class HunyuanVideo(Declared):
    """HunyuanVideo, text to video (arXiv 2412.03603): the guidance scale, times 1000, is an input of its network."""

    pipeline = "HunyuanVideoPipeline"
    needs, takes = ("text", "pooled", "mask"), ("guidance",)
    names = {"text": "encoder_hidden_states", "pooled": "pooled_projections", "mask": "encoder_attention_mask"}
    asks = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_attention_mask"}
    widths = {"text": "text_embed_dim", "pooled": "pooled_projection_dim", "mask": ""}
    stacks = {"block": "transformer_blocks", "single": "single_transformer_blocks"}
    embedder = "time_text_embed.timestep_embedder"
    made_for, patch, embedded, cfg = (33, 90, 160), 0, 6.0, "true_cfg_scale"

    def more(self, x: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        scale = self.scale_of(cond, x)
        return {"guidance": None if scale is None else scale * 1000}

    def tokens(self, size: tuple[int, ...]) -> int:
        return size[0] * super().tokens(size)

    def of_size(self, size: tuple[int, ...]) -> dict[str, Any]:
        return {"num_frames": 4 * (size[0] - 1) + 1}
