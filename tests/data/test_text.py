"""Embeddings are made in batches, file by file, stored without padding, and the encoder is let go."""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.config import UserError
from fewstep.data import text as module
from fewstep.data.placed import encoding
from fewstep.data.text import embed

WIDTH = 37
"""That of no tensor elsewhere."""


def words(prompt: str) -> Tensor:
    """(n, WIDTH) of a prompt of n words."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
    return torch.randn(len(prompt.split()), WIDTH, generator=torch.Generator().manual_seed(seed))


class Ragged:
    """An encoder whose rows are as long as their prompts; a trace of every batch is in them, so that batches count."""

    def __init__(self, store: str | None = None, fails: int = 0) -> None:
        self.store, self.fails, self.batch = store, fails, 2
        self.asked: list[list[str]] = []
        self.device: Any = None
        self.gone: Any = None

    def key(self) -> str:
        return "ragged"

    def open(self, device: Any) -> Any:
        self.device = device

        def encode(prompts: Sequence[str]) -> dict[str, Any]:
            self.asked.append(list(prompts))
            if len(self.asked) == self.fails:
                raise KeyboardInterrupt
            trace = sum(words(p).sum() for p in prompts) * 1e-3
            rows = [words(p) + trace for p in prompts]
            masks = [torch.ones(len(r), dtype=torch.long) for r in rows]
            sizes = torch.full((len(rows), 6), 1366.0)
            return {"text": rows, "mask": masks, "pooled": torch.stack([r.mean(0) for r in rows]), "time_ids": sizes}

        self.gone = weakref.ref(encode)
        return encode


PROMPTS = [" ".join(["word"] * (1 + i % 5) + [str(i)]) for i in range(23)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def test_a_killed_process_loses_one_file_and_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ROWS", 4)
    embed(Ragged(), PROMPTS, negative="none at all", cache=str(tmp_path / "whole"))
    whole = files(tmp_path / "whole")
    assert len(whole) == 6
    with pytest.raises(KeyboardInterrupt):
        embed(Ragged(fails=6), PROMPTS, negative="none at all", cache=str(tmp_path / "cut"))
    kept = files(tmp_path / "cut")
    assert list(kept) == list(whole)[:2]
    second, heard = Ragged(), []
    with encoding("cpu", told=lambda done, count: heard.append((done, count))):
        embed(second, PROMPTS, negative="none at all", cache=str(tmp_path / "cut"))
    assert second.asked == [[*PROMPTS, "none at all"][i : i + 2] for i in range(8, 24, 2)]
    assert files(tmp_path / "cut") == whole
    assert heard == [(8, 24), (12, 24), (16, 24), (20, 24), (24, 24)]
    assert (second.device, second.gone()) == (torch.device("cpu"), None)


def test_no_more_than_a_file_of_embeddings_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of 23 prompts, in files of 4 and batches of 2; what is alive is counted before the last batch is computed."""
    monkeypatch.setattr(module, "ROWS", 4)
    alive = []

    class Counted(Ragged):
        def open(self, device: Any) -> Any:
            encode = super().open(device)

            def counting(prompts: Sequence[str]) -> dict[str, Any]:
                if len(self.asked) == 11:
                    gc.collect()
                    tensors = [x for x in gc.get_objects() if type(x) is Tensor]
                    held = [x for x in tensors if x.shape[-1:] == (WIDTH,)]
                    alive.append(sum(x.untyped_storage().nbytes() for x in held if x.ndim == 2))
                return encode(prompts)

            return counting

    embed(Counted(), PROMPTS, negative="none", cache=str(tmp_path))
    # Of the last file its first two rows, and nothing of the batch that they came in.
    assert alive == [4 * WIDTH * sum(len(p.split()) for p in PROMPTS[20:22])]


def test_rows_have_their_own_lengths_on_disk_and_the_batchs_when_read(tmp_path: Path):
    text = embed(Ragged(), PROMPTS, negative="no", cache=str(tmp_path), batch=1)
    some = torch.tensor([4, 0, 7])
    rows = text.take(some)
    lengths = [len(PROMPTS[i].split()) for i in some.tolist()]
    assert lengths == [6, 2, 4]
    assert rows["text"].shape == (3, 6, WIDTH)
    assert rows["mask"].tolist() == [[1] * n + [0] * (6 - n) for n in lengths]
    for row, i, n in zip(rows["text"], some.tolist(), lengths, strict=True):
        own = words(PROMPTS[i])
        torch.testing.assert_close(row[:n], own + own.sum() * 1e-3)
        assert not bool(row[n:].any())
    held = sum(len(p.split()) for p in [*PROMPTS, "no"])
    (file,) = tmp_path.rglob("*.safetensors")
    assert 4 * WIDTH * held < file.stat().st_size < 4 * WIDTH * (held + 24) + 16 * held + 4096


@pytest.mark.parametrize(("store", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), (None, torch.float32)])
def test_words_are_stored_in_half_precision_sizes_and_masks_are_not(tmp_path: Path, store: str, dtype: torch.dtype):
    exact = embed(Ragged("fp32"), PROMPTS[:3], negative="no", cache=str(tmp_path))
    text = embed(Ragged(store), PROMPTS[:3], negative="no", cache=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    held, k = text.shards.take(torch.arange(3)), torch.arange(3)
    assert {key: v.dtype for key, v in held.items()} == {
        "text": dtype, "pooled": dtype, "mask": torch.int64, "time_ids": torch.float32
    }  # fmt: skip
    assert held["time_ids"][0, 0] == 1366  # 1368 in bfloat16
    for key, value in text.take(k).items():
        want = exact.take(k)[key]
        assert torch.equal(value, want.to(dtype).to(want.dtype) if key in ("text", "pooled") else want)


class Answers(Ragged):
    """Rows of one value."""

    def __init__(self, value: float, dtype: torch.dtype, store: str | None) -> None:
        super().__init__(store)
        self.value, self.dtype = value, dtype

    def open(self, device: Any) -> Any:
        def encode(prompts: Sequence[str]) -> dict[str, Any]:
            rows = torch.ones(len(prompts), 2, 3, dtype=self.dtype)
            rows[["far" in p for p in prompts]] = self.value
            return {"text": rows}

        return encode


@pytest.mark.parametrize(
    ("value", "dtype", "store", "told"),
    [
        (7e4, torch.float32, "fp16", "stored, in float16; give data.encoder.store=bf16, or fp32"),
        (float("inf"), torch.float16, None, "computed, in float16; give data.encoder.dtype=bf16, or fp32"),
        (float("nan"), torch.float16, "fp32", "computed, in float16; give data.encoder.dtype=bf16, or fp32"),
    ],
)
def test_an_embedding_that_overflows_is_refused_by_its_prompt(
    tmp_path: Path, value: float, dtype: torch.dtype, store: str | None, told: str
):
    with pytest.raises(UserError) as caught:
        embed(Answers(value, dtype, store), ["near", "so far"], cache=str(tmp_path))
    assert str(caught.value) == f"data.encoder: the embedding of 'so far' holds NaN or infinity as it is {told}"
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_batch_that_does_not_fit_names_its_key(tmp_path: Path):
    class Large(Ragged):
        def open(self, device: Any) -> Any:
            def encode(prompts: Sequence[str]) -> dict[str, Any]:
                raise torch.OutOfMemoryError("tried to allocate")

            return encode

    with pytest.raises(UserError) as caught, encoding("cpu"):
        embed(Large(), PROMPTS, cache=str(tmp_path))
    assert str(caught.value) == (
        "data.encoder: 2 prompts at once do not fit into the memory of cpu; give a smaller data.encoder.batch, or "
        "data.encoder.dtype=bf16"
    )
