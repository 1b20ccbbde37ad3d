"""Tiny random-weight pipelines of today's families, whole: with text encoders, a word a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers as d
import torch
from tiny_pipelines import network_of, vae
from tiny_text import word_tokenizer

PROMPTS = ("a red square", "two green dots", "one long line of blue")
CHAT = (
    "{% for m in messages %}start {{ m['content'] if m['content'] is string else m['content'][0]['text'] }} stop "
    "{% endfor %}"
)


@dataclass(frozen=True)
class Today:
    """How one is built; `shape` is that of x, `guided` the pipeline's arguments at a scale of 3 as fewstep counts it."""

    build: Callable[[], Any]
    shape: tuple[int, ...]
    pipeline: str
    guided: dict[str, float]
    encoder: Callable[[], Any]


def flow(**config: Any) -> Any:
    return d.FlowMatchEulerDiscreteScheduler(**config)


def dynamic(**config: Any) -> Any:
    return flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, **config)


def tokenizer(length: int = 64, words: str = "") -> Any:
    made = word_tokenizer([*PROMPTS, "start stop", words], length)
    made.chat_template = CHAT
    return made


def qwen3(width: int, layers: int, kind: str = "Qwen3Model") -> Any:
    import transformers

    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 4, "vocab_size": len(tokenizer()), "max_position_embeddings": 600}
    return getattr(transformers, kind)(transformers.Qwen3Config(**sizes, **more))


def z_image() -> Any:
    transformer = d.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return d.ZImagePipeline(
        transformer=transformer, vae=vae(4, scaling_factor=0.3611, shift_factor=0.1159), scheduler=flow(shift=3.0),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip


def qwen_vae(channels: int = 4) -> Any:
    return d.AutoencoderKLQwenImage(
        base_dim=channels * 3, z_dim=channels, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1 * i for i in range(channels)], latents_std=[1.5 + 0.1 * i for i in range(channels)],
    )  # fmt: skip


def qwen_image() -> Any:
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
        shift_terminal=0.02,
    )  # fmt: skip
    return d.QwenImagePipeline(
        transformer=transformer, vae=qwen_vae(), scheduler=scheduler, text_encoder=None, tokenizer=None
    )


def qwen_vl() -> dict[str, Any]:
    """Qwen2.5-VL of the language alone in use, and words for the pipeline's own template."""
    import transformers

    words = tokenizer(200, "system Describe the image by detailing color, shape user assistant")
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": len(words), "max_position_embeddings": 600,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 1, "out_hidden_size": 16, "intermediate_size": 8}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, bos_token_id=0, eos_token_id=0)
    return {"text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config), "tokenizer": words}


def chroma() -> Any:
    transformer = d.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    return d.ChromaPipeline(
        transformer=transformer, vae=vae(4, scaling_factor=0.3611, shift_factor=0.1159), scheduler=dynamic(),
        text_encoder=None, tokenizer=None, image_encoder=None, feature_extractor=None,
    )  # fmt: skip


def t5(kind: str = "T5") -> dict[str, Any]:
    import transformers

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    words = tokenizer(512)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(words), **sizes)
    return {"text_encoder": getattr(transformers, f"{kind}EncoderModel")(config), "tokenizer": words}


def flux2(guidance: bool = True) -> Any:
    transformer = d.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=32, axes_dims_rope=[4, 4, 4, 4], guidance_embeds=guidance,
    )  # fmt: skip
    coder = d.AutoencoderKLFlux2(
        sample_size=32, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), layers_per_block=1, latent_channels=4, norm_num_groups=1,
    )  # fmt: skip
    coder.bn.running_mean.copy_(0.1 * torch.arange(16.0))
    coder.bn.running_var.copy_(0.5 + 0.1 * torch.arange(16.0))
    kind = d.Flux2Pipeline if guidance else d.Flux2KleinPipeline
    return kind(transformer=transformer, vae=coder, scheduler=dynamic(), text_encoder=None, tokenizer=None)


def wan_vae() -> Any:
    return d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def wan() -> Any:
    transformer = d.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return d.WanPipeline(transformer=transformer, vae=wan_vae(), scheduler=scheduler, text_encoder=None, tokenizer=None)


def scaled_vae() -> Any:
    return vae(4, scaling_factor=0.3611, shift_factor=0.1159)


def lumina2() -> Any:
    transformer = d.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=8, num_layers=2, num_attention_heads=1, num_kv_heads=1,
        multiple_of=16, ffn_dim_multiplier=None, norm_eps=1e-5, scaling_factor=1.0, axes_dim_rope=[4, 2, 2],
        cap_feat_dim=16,
    )  # fmt: skip
    # Its pipeline counts on 8 pixels a cell.
    coder = d.AutoencoderKL(
        block_out_channels=(4,) * 4, latent_channels=4, norm_num_groups=2, scaling_factor=0.3611, shift_factor=0.1159,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return d.Lumina2Pipeline(
        transformer=transformer, vae=coder, scheduler=flow(shift=6.0), text_encoder=None, tokenizer=None
    )


def auraflow() -> Any:
    transformer = d.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16,
        pos_embed_max_size=256,
    )  # fmt: skip
    return d.AuraFlowPipeline(
        transformer=transformer, vae=vae(4, scaling_factor=0.13025), scheduler=flow(shift=1.73), text_encoder=None,
        tokenizer=None,
    )  # fmt: skip


def ovis_image() -> Any:
    transformer = d.OvisImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return d.OvisImagePipeline(
        transformer=transformer, vae=scaled_vae(), scheduler=dynamic(), text_encoder=None, tokenizer=None
    )


def krea2() -> Any:
    transformer = d.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2), rope_theta=1000.0,
    )  # fmt: skip
    return d.Krea2Pipeline(
        transformer=transformer, vae=qwen_vae(), scheduler=dynamic(max_image_seq_len=6400), text_encoder=None,
        tokenizer=None, text_encoder_select_layers=(0, 1, 2),
    )  # fmt: skip


def qwen3_vl() -> dict[str, Any]:
    """Qwen3-VL of the language alone in use, and words for the pipeline's own template."""
    import transformers

    words = tokenizer(600, "system Describe the image by detailing color, shape user assistant")
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(words), "max_position_embeddings": 600,
        "rope_scaling": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 1, "out_hidden_size": 16, "intermediate_size": 8}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})
    return {"text_encoder": transformers.Qwen3VLModel(config), "tokenizer": words}


def sana_video() -> Any:
    transformer = d.SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
        mlp_ratio=2.5, sample_size=8, patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = d.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    return d.SanaVideoPipeline(
        transformer=transformer, vae=wan_vae(), scheduler=scheduler, text_encoder=None, tokenizer=None
    )


def hunyuan_video() -> Any:
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    coder = d.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        norm_num_groups=4, scaling_factor=0.476986,
    )  # fmt: skip
    return d.HunyuanVideoPipeline(
        transformer=transformer, vae=coder, scheduler=flow(shift=7.0), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip


def llama_and_clip() -> dict[str, Any]:
    import transformers

    words = tokenizer(400, "system Describe the video by detailing main content and theme user")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    llama = transformers.LlamaModel(
        transformers.LlamaConfig(**sizes, vocab_size=len(words), max_position_embeddings=400, num_key_value_heads=1)
    )
    ids = {"eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 0}
    clip = transformers.CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer(77)),
        max_position_embeddings=77, **ids,
    )  # fmt: skip
    return {
        "text_encoder": llama, "tokenizer": words, "text_encoder_2": transformers.CLIPTextModel(clip),
        "tokenizer_2": tokenizer(77),
    }  # fmt: skip


TODAY = {
    "hunyuan_video": Today(hunyuan_video, (4, 2, 4, 6), "HunyuanVideoPipeline", {}, llama_and_clip),
    "sana_video": Today(
        sana_video, (16, 2, 4, 8), "SanaVideoPipeline", {"guidance_scale": 3.0},
        lambda: {"text_encoder": qwen3(16, 2), "tokenizer": tokenizer(300)},
    ),
    "lumina2": Today(
        lumina2, (4, 8, 12), "Lumina2Pipeline", {"guidance_scale": 3.0},
        lambda: {"text_encoder": qwen3(16, 2), "tokenizer": tokenizer(256)},
    ),
    "auraflow": Today(auraflow, (4, 8, 12), "AuraFlowPipeline", {"guidance_scale": 3.0}, lambda: t5("UMT5")),
    "ovis_image": Today(
        ovis_image, (4, 8, 12), "OvisImagePipeline", {"guidance_scale": 3.0},
        lambda: {"text_encoder": qwen3(16, 2), "tokenizer": tokenizer(300)},
    ),
    "krea2": Today(krea2, (4, 8, 12), "Krea2Pipeline", {"guidance_scale": 2.0}, qwen3_vl),
    "z_image": Today(
        z_image, (4, 8, 12), "ZImagePipeline", {"guidance_scale": 2.0},
        lambda: {"text_encoder": qwen3(16, 2), "tokenizer": tokenizer()},
    ),
    "chroma": Today(chroma, (4, 8, 12), "ChromaPipeline", {"guidance_scale": 3.0}, t5),
    "flux2": Today(
        flux2, (16, 6, 4), "Flux2Pipeline", {},
        lambda: {"text_encoder": qwen3(8, 30, "Qwen3ForCausalLM"), "tokenizer": tokenizer()},
    ),
    "flux2_klein": Today(
        lambda: flux2(False), (16, 6, 4), "Flux2KleinPipeline", {"guidance_scale": 3.0},
        lambda: {"text_encoder": qwen3(8, 28, "Qwen3ForCausalLM"), "tokenizer": tokenizer()},
    ),
    "wan": Today(wan, (16, 2, 4, 6), "WanPipeline", {"guidance_scale": 3.0}, lambda: t5("UMT5")),
    "qwen_image": Today(qwen_image, (4, 8, 12), "QwenImagePipeline", {"true_cfg_scale": 3.0}, qwen_vl),
}  # fmt: skip


def make_today(folder: Path, name: str) -> Path:
    """Saved as a stock pipeline folder, whole with its text encoder; the answer depends on every weight."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        pipe = TODAY[name].build()
        for p in network_of(pipe).parameters():
            p.data.add_(0.05 * torch.randn_like(p))
        pipe.register_modules(**TODAY[name].encoder())
    pipe.save_pretrained(folder)
    return folder
