"""`fewstep cache-text` makes what training then reads, and no encoder is loaded again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_text import text_pipeline

from fewstep.cli import main
from fewstep.commands.cache_text import cache_text
from fewstep.commands.progress import embedding_lines
from fewstep.config import UserError
from fewstep.recipe.store import load

PROMPTS = ("a red square", "two green dots", "blue")


def test_prompts_are_embedded_ahead_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = text_pipeline(tmp_path / "sd", PROMPTS)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"extends: digits-dmd2\ndata: {{name: prompts, path: {tmp_path / 'prompts.txt'}, shape: [4, 8, 8], "
        f"encoder: {{name: pipeline, path: {folder}, store: bf16}}, text_cache: {tmp_path / 'cache'}}}\nevaluate: null\n"
    )
    with pytest.raises(SystemExit) as left:
        main(["cache-text", str(recipe), "--device", "cpu"])
    assert not left.value.code
    said = capsys.readouterr().out
    (made,) = (tmp_path / "cache").iterdir()
    assert "embedded 0/4 prompts  0:00:00\nembedded 4/4 prompts  0:00:0" in said
    assert said.splitlines()[-1] == f"{made}: 3 prompts, 0.0 MiB; text [9, 12] in bfloat16"
    cache_text(str(recipe), out=tmp_path / "words")
    assert (tmp_path / "words" / "00000.safetensors").read_bytes() == (made / "00000.safetensors").read_bytes()
    with pytest.raises(SystemExit) as left:
        main(["cache-text", str(recipe), "--device", "cpu", "--out", str(tmp_path / "few"), "--rank", "2"])
    assert not left.value.code
    said = capsys.readouterr().out.splitlines()[-2:]
    assert said == [
        f"{tmp_path / 'few'}: 3 prompts, 0.0 MiB; text_left [9, 2] in float16, text_right [2, 12] in float16",
        f"use them with data.encoder: {{name: cached, path: {tmp_path / 'few'}}}",
    ]
    with pytest.raises(UserError, match=r"^--rank: is of the copy that --out FOLDER writes"):
        cache_text(str(recipe), rank=2)
    with pytest.raises(UserError, match=r"exists and is not an earlier folder of embedded prompts"):
        cache_text(str(recipe), out=folder)
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(folder / "tokenizer", folder / "text_encoder")  # there, and no model
    with pytest.raises(UserError, match="text_encoder/"):
        cache_text(str(recipe))
    with pytest.raises(UserError, match=r"^device gpu: is not here; there is cpu"):
        cache_text(str(recipe), device="gpu")
    with pytest.raises(UserError, match=r"its data have no text encoder, so there is nothing to embed; give data\.enc"):
        cache_text("digits-dmd2")
    assert load(str(recipe)).data.encoder.batch == 32  # type: ignore[attr-defined]
    assert made.is_dir()
    assert torch.get_default_dtype() == torch.float32


def test_lines_come_at_the_beginning_after_each_tenth_and_at_the_end(monkeypatch: pytest.MonkeyPatch):
    now, said = [100.0], list[str]()
    monkeypatch.setattr("fewstep.commands.progress.time.perf_counter", lambda: now[0])
    told = embedding_lines(said.append)
    for done in range(200, 1001, 50):
        told(done, 1000)
        now[0] += 1
    assert [line.split()[1] for line in said] == [f"{n}/1000" for n in range(200, 1001, 100)]
    assert said[:2] == ["embedded 200/1000 prompts  0:00:00", "embedded 300/1000 prompts  0:00:02, about 0:00:14 left"]
    assert said[-1] == "embedded 1000/1000 prompts  0:00:16"
