"""A text-to-image teacher of pixels trained here as an IFPipeline folder, with its text encoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.algebra.process import DiscreteVP
from fewstep.config import UserError
from fewstep.export.base import halved
from fewstep.export.picture import IF_PIPELINES, no_noise, whole_model
from fewstep.export.stock import without_variance
from fewstep.files import read_json
from fewstep.networks.adapters import plain_copy
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.folder import resolve
from fewstep.networks.wrappers.unet_condition import UNetCondition
from fewstep.train.product import Product

IF_TOKENS = 77
"""IFPipeline pads every prompt to so many tokens."""


def is_text_teacher(net: nn.Module) -> bool:
    """True for a UNet of pixels with text or a picture that predicts v on a DDPM table, as `unet-text` builds it."""
    return (
        isinstance(net, Denoiser)
        and isinstance(net.net, UNetCondition)
        and net.net.pipeline in IF_PIPELINES
        and isinstance(net.process, DiscreteVP)
        and (net.prediction, net.time_input) == ("v", "index")
    )


def save_text_teacher(product: Product, folder: Path) -> None:
    """Write the teacher, weights in fp16, as a folder that `teacher: {name: diffusers}` and, unguided, IFPipeline open.

    The recipe's `sentence` encoder goes along where its conditions are those that the pipeline makes of a prompt
    (77 tokens, `keys: [text]`); otherwise the folder takes `prompt_embeds`.
    """
    from diffusers import DDIMScheduler, IFPipeline, IFSuperResolutionPipeline

    assert product.recipe is not None
    net: Any = plain_copy(product.net)
    process = net.process
    scheduler = DDIMScheduler(
        num_train_timesteps=process.steps,
        beta_schedule=process.schedule,
        beta_start=process.beta_start,
        beta_end=process.beta_end,
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    absent: Any = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    more = {"image_noising_scheduler": no_noise()} if net.net.image_channels else {}
    pipe: Any = (IFSuperResolutionPipeline if net.net.image_channels else IFPipeline)(
        **absent,
        **more,
        unet=halved(whole_model(net.net)),
        scheduler=without_variance(scheduler),
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    encoder: Any = getattr(product.recipe.data, "encoder", None)
    if getattr(encoder, "name", None) == "sentence" and (encoder.length, encoder.keys) == (
        IF_TOKENS,
        ("text",),
    ):
        _add_encoder(folder, resolve(encoder.path))


def _add_encoder(to: Path, root: Path) -> None:
    """The encoder's folder as the pipeline's text_encoder/ and tokenizer/."""
    from transformers import AutoTokenizer

    config = read_json(root / "config.json")
    names = config.get("architectures") or []
    if len(names) != 1:
        raise UserError(f"{root / 'config.json'}: architectures is {names}; expected the one class of the model")
    (to / "text_encoder").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(root / name, to / "text_encoder" / name)
    tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=False)
    tokenizer.save_pretrained(to / "tokenizer")
    index = read_json(to / "model_index.json")
    index["text_encoder"] = ["transformers", names[0]]
    index["tokenizer"] = ["transformers", type(tokenizer).__name__]
    (to / "model_index.json").write_text(json.dumps(index, indent=2))
