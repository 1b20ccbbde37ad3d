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
from fewstep.data.cached import write_embedded
from fewstep.data.placed import encoding
from fewstep.data.shards import Shards, read_index
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


def cache_text(
    name: str,
    settings: Sequence[str] = (),
    *,
    device: str | None = None,
    out: Path | None = None,
    rank: int | None = None,
) -> Embedded:
    """Embed what the data of a recipe embeds when it is opened; what is in the cache already is not made again.

    out, rank: folder to copy it to, with the prompts, for the encoder `cached`: see `fewstep.data.cached.write_embedded`.

    UserError for data without a text encoder, and for a device that is not here.
    """
    from fewstep.recipe.store import load

    if rank is not None and out is None:
        raise UserError("--rank: is of the copy that --out FOLDER writes; the cache keeps what the encoder made")
    spec: Any = load(name, settings).data
    with encoding(device, embedding_lines(say)):
        data = spec.open()
    text: Text | None = getattr(data, "text", None)
    if text is None:
        raise UserError(
            f"{name}: its data have no text encoder, so there is nothing to embed; give data.encoder, such as "
            "{name: pipeline, path: TEACHER}"
        )
    if out is not None:
        write_embedded(text, spec, out, rank)
    folder = out or text.shards.folder
    told = read_index(folder)
    shards = Shards(folder, {}, told["count"])
    first = shards.take(torch.tensor([0]))
    shown = ", ".join(f"{k} {list(v.shape[1:])} in {str(v.dtype).removeprefix('torch.')}" for k, v in first.items())
    return Embedded(folder, len(text), sum(size for size, _ in shards.done.values()), shown)
