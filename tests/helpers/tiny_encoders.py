"""Whole text encoders of the older families, in pipelines without networks; what a pipeline's call makes of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers as d
import torch
from tiny_families import qwen3, t5, tokenizer
from tiny_pipelines import sdxl


@dataclass(frozen=True)
class Older:
    """A pipeline's class and encoders; `returns` are the keys of what its encode_prompt returns first, "" is not used."""

    kind: str
    parts: Callable[[], dict[str, Any]]
    returns: tuple[str, ...] = ("text",)
    call: dict[str, Any] = field(default_factory=dict)


def clip(width: int, projection: bool = False) -> Any:
    import transformers

    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    ids = {"eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 9}
    config = transformers.CLIPTextConfig(vocab_size=len(tokenizer()), projection_dim=6, **ids, **sizes)
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def euler() -> dict[str, Any]:
    return {"scheduler": d.EulerDiscreteScheduler(), "vae": None}


def flow() -> dict[str, Any]:
    return {"scheduler": d.FlowMatchEulerDiscreteScheduler(), "vae": None, "transformer": None}


def checked() -> dict[str, Any]:
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, "unet": None}


def stable() -> dict[str, Any]:
    return euler() | checked() | {"text_encoder": clip(12), "tokenizer": tokenizer(9)}


def xl() -> dict[str, Any]:
    whole = sdxl()
    parts = {"text_encoder_2": clip(8, True), "tokenizer_2": tokenizer(9), "unet": whole.unet, "vae": whole.vae}
    return euler() | parts | {"text_encoder": clip(12), "tokenizer": tokenizer(9)}


def three() -> dict[str, Any]:
    large = t5()
    parts = {"text_encoder_2": clip(8, True), "tokenizer_2": tokenizer(9)}
    third = {"text_encoder_3": large["text_encoder"], "tokenizer_3": large["tokenizer"]}
    return flow() | parts | third | {"text_encoder": clip(6, True), "tokenizer": tokenizer(9)}


def flux() -> dict[str, Any]:
    large = t5()
    second = {"text_encoder_2": large["text_encoder"], "tokenizer_2": large["tokenizer"]}
    return flow() | second | {"text_encoder": clip(8), "tokenizer": tokenizer(9)}


def pixels() -> dict[str, Any]:
    return {"scheduler": d.DDPMScheduler(), "watermarker": None} | checked() | t5()


def sana() -> dict[str, Any]:
    return flow() | {"text_encoder": qwen3(16, 2), "tokenizer": tokenizer(300)}


SIZE = {"height": 64, "width": 64}
MASKED = ("text", "mask")
SMALL = {"use_resolution_binning": False, "guidance_scale": 1.0}
OLDER = {
    "sd": Older("StableDiffusionPipeline", stable, call={"guidance_scale": 1.0}),
    "sdxl": Older("StableDiffusionXLPipeline", xl, ("text", "", "pooled"), {"guidance_scale": 1.0}),
    "sd3": Older("StableDiffusion3Pipeline", three, ("text", "", "pooled"), {"guidance_scale": 1.0}),
    "flux": Older("FluxPipeline", flux, ("text", "pooled")),
    "pixart_alpha": Older("PixArtAlphaPipeline", lambda: flow() | t5(), MASKED, SMALL),
    "pixart_sigma": Older("PixArtSigmaPipeline", lambda: flow() | t5(), MASKED, SMALL),
    "if": Older("IFPipeline", pixels, call={"guidance_scale": 1.0}),
    "sana": Older("SanaPipeline", sana, MASKED, SMALL),
    "sana_sprint": Older("SanaSprintPipeline", sana, MASKED, SMALL | {"intermediate_timesteps": None}),
}


def make_older(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """Saved as a stock pipeline folder of encoders and tokenizers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        pipe = getattr(d, OLDER[name].kind)(**OLDER[name].parts())
    for key, part in pipe.components.items():
        if key.startswith("text_encoder"):
            part.to(dtype)
    pipe.save_pretrained(folder)
    return folder


class _Encoded(Exception):
    pass


def called(pipe: Any, prompt: str, **call: Any) -> Sequence[Any]:
    """What a pipeline's own encode_prompt returns within its own call, which ends there."""
    inner = pipe.encode_prompt

    def encode(*args: Any, **more: Any) -> Any:
        raise _Encoded(inner(*args, **more))

    pipe.encode_prompt = encode
    try:
        pipe(prompt=[prompt], num_inference_steps=2, **call)
    except _Encoded as encoded:
        return encoded.args[0]
    finally:
        pipe.encode_prompt = inner
    raise AssertionError(f"{type(pipe).__name__} encoded no prompt")
