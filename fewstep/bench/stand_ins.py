"""Small parts in the place of a pipeline's large ones, for a network of the real size whose steps alone are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.encoders import PipelineEncoder


def save_vae(to: Path, channels: int, **config: Any) -> None:
    """A VAE eight channels wide, of so many latent channels at an eighth of the size, into a folder."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "latent_channels": channels}
    AutoencoderKL(**sizes, **blocks, **config).save_pretrained(to)


def without_text_encoders(wrapper: Any, key: str) -> None:
    """From now on, in this process, captions are embedded by a wrapper's example; key: of them in caches."""

    def encode(texts: Sequence[str]) -> dict[str, Tensor]:
        return dict(wrapper.example(len(texts), torch.Generator()))

    PipelineEncoder.open = lambda self, device: encode  # type: ignore[assignment, method-assign, return-value]
    PipelineEncoder.key = lambda self: key  # type: ignore[method-assign]
    PipelineEncoder.zeros_for_empty = lambda self: False  # type: ignore[method-assign]
    PipelineEncoder.files = lambda self: []  # type: ignore[method-assign]
