"""Shared by the tests of text encoders: a Stable Diffusion folder whose own encode_prompt runs, and a command's run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def word_tokenizer(prompts: Sequence[str], length: int) -> Any:
    """One token a word of the prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *sorted({w for p in prompts for w in p.split()})]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", model_max_length=length)


def text_pipeline(folder: Path, prompts: Sequence[str], **parts: Any) -> Path:
    """Saved as a stock folder; without UNet and VAE where `parts` gives none."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = word_tokenizer(prompts, 9)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ids = {"eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=9, **ids, **sizes)
        text = CLIPTextModel(config)
    given: dict[str, Any] = {"unet": None, "vae": None, "text_encoder": text, "tokenizer": tokenizer} | parts
    StableDiffusionPipeline(
        **given, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def pickle_weights(file: Path, name: str, **wrapped: Any) -> Path:
    """A safetensors file as a pickled state dict of that name in its place; `wrapped` adds to the dictionary."""
    from safetensors.torch import load_file

    weights: dict[str, Any] = load_file(file)
    to = file.with_name(name)
    torch.save({"state_dict": weights, **wrapped} if wrapped else weights, to)
    file.unlink()
    return to


def run_command(message: str) -> None:
    """Run the `python -c CODE` that a message ends in, as the shell would split it."""
    python, flag, code = shlex.split(message.splitlines()[-1])
    assert (python, flag) == ("python", "-c")
    exec(code, {})
