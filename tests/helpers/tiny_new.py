"""Shared by the tests of `fewstep new`: pictures, and text encoders that answer what a tiny pipeline takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor


def make_pictures(
    folder: Path, count: int = 6, size: tuple[int, int] = (16, 16), classes: int = 0, grey: bool = False
) -> Path:
    """Random pictures (height, width), in the sub-folders of their classes where there are any."""
    for i in range(count):
        into = folder / f"class{i % classes}" if classes else folder
        into.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, size if grey else (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(into / f"{i}.png")
    return folder


def stand_in_for_text(monkeypatch: pytest.MonkeyPatch, wrapper: Any) -> None:
    """Let the encoder `pipeline` answer random embeddings of the shapes that a wrapper takes, the same for a prompt."""
    from fewstep.data.encoders import PipelineEncoder

    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        rows = []
        for prompt in prompts:
            seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
            rows.append({k: v for k, v in wrapper.example(1, torch.Generator().manual_seed(seed)).items()})
        return {k: torch.cat([row[k] for row in rows]) for k in rows[0] if k != "guidance"}

    monkeypatch.setattr(PipelineEncoder, "key", lambda self: type(wrapper).__name__)
    monkeypatch.setattr(PipelineEncoder, "open", lambda self, device: encode)
    monkeypatch.setattr(PipelineEncoder, "zeros_for_empty", lambda self: False)
    monkeypatch.setattr(PipelineEncoder, "files", lambda self: [])
