"""`fewstep cache-text`: the prompts or captions of a recipe embedded ahead of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.commands.progress import embedding_lines
from fewstep.commands.report import say
from fewstep.config import UserError
from fewstep.data.placed import encoding
from fewstep.data.text import Text


@dataclass(frozen=True)
class Embedded:
    """A cache of embeddings."""

    folder: Path
    prompts: int
    size: int
    """Bytes on disk."""
    told: str
    """Keys with the shape and dtype of a row."""

    def line(self) -> str:
        return f"{self.folder}: {self.prompts} prompts, {self.size / 2**20:.1f} MiB; {self.told}"


def cache_text(name: str, settings: Sequence[str] = (), *, device: str | None = None) -> Embedded:
    """Embed what the data of a recipe embeds when it is opened; what is in the cache already is not made again.

    UserError for data without a text encoder, and for a device that is not here.
    """
    from fewstep.recipe.store import load

    with encoding(device, embedding_lines(say)):
        data: Any = load(name, settings).data.open()
    text: Text | None = getattr(data, "text", None)
    if text is None:
        raise UserError(
            f"{name}: its data have no text encoder, so there is nothing to embed; give data.encoder, such as "
            "{name: pipeline, path: TEACHER}"
        )
    first = text.shards.take(torch.tensor([0]))
    told = ", ".join(f"{k} {list(v.shape[1:])} in {str(v.dtype).removeprefix('torch.')}" for k, v in first.items())
    size = sum(size for size, _ in text.shards.done.values())
    return Embedded(text.shards.folder, len(text), size, told)
