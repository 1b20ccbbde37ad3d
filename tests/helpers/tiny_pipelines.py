"""Tiny random-weight pipelines of every class that has a wrapper, built by diffusers and saved as it saves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers as d
import torch
from torch import nn


@dataclass(frozen=True)
class Family:
    """How one is built; `shape` is that of x, B differs from all of it in the tests."""

    build: Callable[[], Any]
    shape: tuple[int, int, int]
    pipeline: str
    kind: str
    tap: str


def vae(channels: int, **factors: float) -> Any:
    return d.AutoencoderKL(
        block_out_channels=(4, 8), latent_channels=channels, norm_num_groups=2, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **factors,
    )  # fmt: skip


def unet_condition(**more: Any) -> Any:
    return d.UNet2DConditionModel(
        sample_size=(8, 12), in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12, attention_head_dim=4, **more,
    )  # fmt: skip


SD_BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def text_parts(**parts: Any) -> dict[str, Any]:
    """SD components without text encoder."""
    given = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    return given | {"requires_safety_checker": False} | parts


def sd15() -> Any:
    scheduler = d.PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1, prediction_type="epsilon")
    return d.StableDiffusionPipeline(
        **text_parts(unet=unet_condition(), vae=vae(4, scaling_factor=0.18215), scheduler=scheduler)
    )


def sd21() -> Any:
    scheduler = d.DDIMScheduler(**SD_BETAS, prediction_type="v_prediction", clip_sample=False)
    return d.StableDiffusionPipeline(**text_parts(unet=unet_condition(), vae=None, scheduler=scheduler))


def sdxl() -> Any:
    unet = unet_condition(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=34
    )
    return d.StableDiffusionXLPipeline(
        vae=vae(4, scaling_factor=0.13025), text_encoder=None, text_encoder_2=None, tokenizer=None,
        tokenizer_2=None, unet=unet, scheduler=d.EulerDiscreteScheduler(**SD_BETAS), add_watermarker=False,
    )  # fmt: skip


def dit(classes: int = 1000) -> Any:
    transformer = d.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=classes, norm_num_groups=8,
    )  # fmt: skip
    scheduler = d.DDIMScheduler(clip_sample=False)
    return d.DiTPipeline(transformer=transformer, vae=vae(4, scaling_factor=0.18215), scheduler=scheduler)


def sd3() -> Any:
    transformer = d.SD3Transformer2DModel(
        sample_size=(8), patch_size=2, in_channels=6, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=6,
        pos_embed_max_size=12,
    )  # fmt: skip
    return d.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(6, scaling_factor=1.5305, shift_factor=0.0609), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def flux() -> Any:
    transformer = d.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return d.FluxPipeline(
        transformer=transformer, scheduler=scheduler, vae=vae(4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip


def pixart() -> Any:
    transformer = d.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, caption_channels=12, sample_size=8, patch_size=2, norm_num_groups=8,
    )  # fmt: skip
    scheduler = d.DPMSolverMultistepScheduler(prediction_type="epsilon")
    return d.PixArtSigmaPipeline(
        transformer=transformer, scheduler=scheduler, vae=vae(4, scaling_factor=0.13025), tokenizer=None,
        text_encoder=None,
    )  # fmt: skip


def sana() -> Any:
    transformer = d.SanaTransformer2DModel(
        in_channels=5, out_channels=5, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        mlp_ratio=2.0, sample_size=8, patch_size=1,
    )  # fmt: skip
    scheduler = d.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return d.SanaPipeline(transformer=transformer, scheduler=scheduler, vae=None, tokenizer=None, text_encoder=None)


FAMILIES = {
    "sd15": Family(sd15, (4, 8, 12), "StableDiffusionPipeline", "eps", "mid"),
    "sd21": Family(sd21, (4, 8, 12), "StableDiffusionPipeline", "v", "down1"),
    "sdxl": Family(sdxl, (4, 8, 12), "StableDiffusionXLPipeline", "eps", "mid"),
    "dit": Family(dit, (4, 8, 8), "DiTPipeline", "eps", "block1"),
    "sd3": Family(sd3, (6, 8, 12), "StableDiffusion3Pipeline", "velocity", "block1"),
    "flux": Family(flux, (4, 6, 8), "FluxPipeline", "velocity", "single0"),
    "pixart": Family(pixart, (4, 8, 12), "PixArtSigmaPipeline", "eps", "block0"),
    "sana": Family(sana, (5, 8, 12), "SanaPipeline", "velocity", "block0"),
}


def network_of(pipe: Any) -> nn.Module:
    """Its unet or transformer."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def build(name: str) -> Any:
    """The pipeline with weights under which the answer depends on everything."""
    return built(FAMILIES[name].build)


def built(make: Callable[[], Any]) -> Any:
    """`build` for a pipeline of one's own making."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        pipe = make()
        for p in network_of(pipe).parameters():
            # diffusers starts some output layers at zero, which would hide what lies before them
            p.data.add_(0.05 * torch.randn_like(p))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pipeline(folder: Path, name: str) -> Path:
    """Saved as a stock pipeline folder."""
    build(name).save_pretrained(folder)
    return folder
