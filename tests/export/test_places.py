"""No folder of the machine that wrote an export stands in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewstep.export.base import forget_places


def test_folders_are_dropped_and_names_of_the_hub_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine" / "export").mkdir(parents=True)
    (tmp_path / "org" / "model").mkdir(parents=True)
    told = {
        "unet/config.json": ("_name_or_path", str(tmp_path / "runs" / "mine"), False),
        "text_encoder/config.json": ("_name_or_path", "/gone/since", False),
        "model_index.json": ("_name_or_path", "runs/mine/export", False),
        "tokenizer/tokenizer_config.json": ("name_or_path", "./runs/mine", False),
        "transformer/config.json": ("_name_or_path", "org/model", True),
    }
    for name, (key, value, _) in told.items():
        file = tmp_path / "export" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"ä": 1, key: value}, indent=2) + "\n")
    whole = tmp_path / "export" / "clip" / "config.json"
    whole.parent.mkdir()
    whole.write_text(json.dumps({"text_config": {"_name_or_path": "/home/me/clip", "layers": 2}}))
    whole.chmod(0o444)
    broken = tmp_path / "export" / "clip" / "generation_config.json"
    broken.write_text('{"_name_or_path": "/home/me')
    plain = tmp_path / "export" / "config.json"
    plain.write_text("[1]")
    before = (tmp_path / "export" / "transformer" / "config.json").read_bytes()
    forget_places(tmp_path / "export")
    for name, (key, value, stays) in told.items():
        held = json.loads((tmp_path / "export" / name).read_text())
        assert held == ({"ä": 1, key: value} if stays else {"ä": 1}), name
    assert (tmp_path / "export" / "transformer" / "config.json").read_bytes() == before
    assert plain.read_text() == "[1]"
    assert json.loads(whole.read_text()) == {"text_config": {"layers": 2}}
    assert broken.read_text().endswith("/me")  # a copy of the user's, as it was
