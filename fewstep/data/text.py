"""Prompts as conditions: embeddings computed once, kept on disk, the encoder dropped from memory."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.condition import moved, nulled, zeros_like
from fewstep.config import UserError
from fewstep.data.encoders import DTYPES, Encode
from fewstep.data.placed import placed, tell
from fewstep.data.shards import Shards, Sparse, longer, sparse
from fewstep.files import expanded, lines_of, prompt_of, text_of

ROWS = 64
"""Prompts per file of a cache: what a process holds of them at once, and what one that is killed loses."""
WORDS = ("text", "text2", "pooled")
"""What is stored in another dtype; sizes and masks are not."""
TOKENS = ("text", "mask", "text2", "mask2")
"""What is stored without its zeros."""


def default_cache() -> Path:
    """Where embeddings are kept: $FEWSTEP_CACHE, or fewstep/ in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or expanded("~") / ".cache"
    return Path(os.environ.get("FEWSTEP_CACHE") or Path(base) / "fewstep") / "text"


class Text:
    """Embeddings of a list of prompts, row by row, and what guidance puts in their place.

    Args:
        shards: rows of all prompts.
        empty: one row (1, ...) for each key that guidance takes away.
        prompts: the words of the rows.
    """

    def __init__(self, shards: Shards, empty: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        self.shards, self.empty, self.prompts = shards, dict(empty), tuple(prompts)

    def __len__(self) -> int:
        return len(self.shards) - 1

    def take(self, k: Tensor) -> dict[str, Tensor]:
        """The conditions of prompts by number, int64 (b,), on k's device in float32.

        With a mask they are as long as what guidance puts in their place, or longer.
        """
        rows = self.shards.take(k)
        for tokens, mask in (("text", "mask"), ("text2", "mask2")):
            least = self.empty[tokens].shape[1] if {tokens, mask} <= {*self.empty} else 0
            for key in (tokens, mask):
                if least and rows[key].shape[1] < least:
                    rows[key] = longer(rows[key].transpose(0, 1), least).transpose(0, 1)
        return moved(rows, k.device, torch.float32)

    def null(self, cond: Any) -> Any:
        return nulled(cond, self.empty)


def embed(
    encoder: Any,
    prompts: Sequence[str],
    *,
    negative: str = "",
    zeros: bool | None = None,
    cache: str | None = None,
    batch: int | None = None,
) -> Text:
    """The embeddings of prompts from the cache; what it lacks is computed, then the encoder is let go.

    Args:
        encoder: an encoder part. It computes on the device of `fewstep.data.placed`.
        negative: prompt that guidance moves away from.
        zeros: guidance moves away from zeros in its place, as SDXL's `force_zeros_for_empty_prompt` has it; None: as
            the encoder's folder says, where `negative` is empty.
        cache: folder for the cache; `default_cache()` when left out.
        batch: prompts at once; the encoder's own number when left out.

    A cache is of one encoder's files, one list of prompts and one negative: its name is their hash. It is filled file by
    file, no more than one of which is in memory; a process that goes on where another was killed makes the same bytes.
    Of several processes one fills it while the others wait.
    """
    if not prompts:
        raise UserError("prompts: there are none")
    batch = batch if batch is not None else int(getattr(encoder, "batch", 32))
    store = DTYPES.get(encoder.store or "")
    facts = {"encoder": encoder.key(), "prompts": _digest([*prompts, negative]), "store": encoder.store or "as computed"}
    root = expanded(cache) if cache else default_cache()
    rows = [*prompts, negative]
    folder = root / _digest([json.dumps(facts)])[:32]
    shards = Shards(folder, facts, len(rows), max(ROWS, batch), remedy="delete this folder")
    with shards.claimed() as todo:
        if todo:
            encode, left = encoder.open(placed()), sum(map(len, todo))
            tell(len(rows) - left, len(rows))
            for span in todo:
                shards.write(span, _embedded(encode, rows[span.start : span.stop], batch, store))
                left -= len(span)
                tell(len(rows) - left, len(rows))
            del encode
            gc.collect()  # pipelines refer to themselves
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    shards.check()
    last = moved(shards.take(torch.tensor([len(prompts)])), None, torch.float32)
    empty = {k: v for k, v in last.items() if k in (*TOKENS, "pooled")}
    if zeros is None:
        zeros = not negative and bool(getattr(encoder, "zeros_for_empty", bool)())
    return Text(shards, empty | (zeros_like(last) if zeros else {}), prompts)


def _embedded(
    encode: Encode, prompts: Sequence[str], batch: int, store: torch.dtype | None
) -> dict[str, Tensor | list[Sparse]]:
    """What a file holds of prompts, on the CPU."""
    parts: dict[str, list[Any]] = {}
    for start in range(0, len(prompts), batch):
        for key, rows in _batch(encode, prompts[start : start + batch], store).items():
            parts.setdefault(key, []).extend(rows)
    return {k: v if k in TOKENS else torch.stack(v) for k, v in parts.items()}


def _batch(encode: Encode, prompts: Sequence[str], store: torch.dtype | None) -> dict[str, list[Any]]:
    """The rows of a batch as they are stored, by key; what the encoder made is gone when this returns."""
    try:
        made = encode(prompts)
    except torch.OutOfMemoryError:
        raise UserError(
            f"data.encoder: {len(prompts)} prompts at once do not fit into the memory of {placed()}; give a smaller "
            "data.encoder.batch, or data.encoder.dtype=bf16"
        ) from None
    return {key: _rows(key, value, prompts, store) for key, value in made.items()}


def _rows(key: str, value: Tensor | Sequence[Tensor], prompts: Sequence[str], store: torch.dtype | None) -> list[Any]:
    """The rows of one key, none of which keeps the batch alive. UserError naming a prompt's that is not finite."""
    out: list[Any] = []
    for row, prompt in zip(value.cpu() if isinstance(value, Tensor) else value, prompts, strict=True):
        kept = row.to("cpu", store if key in WORDS else None)
        if not bool(torch.isfinite(kept).all()):
            # Float16 ends at 65504, which states of large encoders exceed.
            stored = bool(torch.isfinite(row).all())
            how, key = ("stored", "store") if stored else ("computed", "dtype")
            raise UserError(
                f"data.encoder: the embedding of {prompt[:60]!r} holds NaN or infinity as it is {how}, in "
                f"{str((kept if stored else row).dtype).removeprefix('torch.')}; give data.encoder.{key}=bf16, or fp32"
            )
        out.append(sparse(kept) if key in TOKENS else kept.clone())
    return out


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, or a .jsonl of objects with a "prompt"; blank lines are left out. UserError names the file."""
    try:
        lines = lines_of(text_of(path.read_bytes(), path))
    except OSError as error:
        raise UserError(f"prompts {path}: cannot be read: {error}") from None
    except ValueError as error:
        raise UserError(f"prompts {error}") from None
    told = [(n, line.strip(" \t\r")) for n, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        told = [(n, prompt_of(line, f"prompts {path}:{n}")) for n, line in told]
    prompts = [text for _, text in told]
    if not prompts:
        raise UserError(f"prompts {path}: holds no prompt; write one a line")
    return prompts
