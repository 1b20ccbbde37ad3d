"""Embeddings that go without their encoder say what it would have said, and which one is needed for more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_emoji import FOOD, make_text

from fewstep.config import UserError
from fewstep.data.cached import NAME, CachedEncoder, factors, with_encoder, write_embedded
from fewstep.data.encoders import SentenceEncoder
from fewstep.data.pictures import Captions, Prompts
from fewstep.data.text import embed
from fewstep.eval.features.retrieval import Retrieval
from fewstep.files import crc32_of, expanded, read_json
from fewstep.recipe.store import load

WORDS = [name.lower() for name in FOOD]
ALL = torch.arange(len(WORDS))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text model in `model`, and its embeddings of WORDS in float32 and in float16."""
    root = tmp_path_factory.mktemp("cached")
    make_text(root / "package")
    shutil.copytree(root / "package" / "some_package" / "model", root / "model")
    (root / "words.txt").write_text("\n".join(WORDS))
    for store in ("fp32", "fp16"):
        spec = prompts(root, encoder(root, store=store))
        write_embedded(spec.open().text, spec, root / store)
    return root


def encoder(root: Path, name: str = "model", **more: Any) -> SentenceEncoder:
    return SentenceEncoder(path=str(root / name), length=9, keys=("text",), **more)


def prompts(root: Path, encoder: Any) -> Prompts:
    cache = str(root / "cache")
    return Prompts(path=str(root / "words.txt"), shape=(3, 8, 8), encoder=encoder, text_cache=cache)


def cached(root: Path, store: str = "fp32", **more: Any) -> CachedEncoder:
    return CachedEncoder(path=str(root / store), **more)


def refused(encoder: CachedEncoder, tmp_path: Path, *prompts: str) -> str:
    with pytest.raises(UserError) as caught:
        embed(encoder, prompts or ("banana",), cache=str(tmp_path / "own"))
    return str(caught.value)


def test_rows_and_the_null_are_the_encoders_own(root: Path):
    theirs, ours = (prompts(root, e).open() for e in (encoder(root), cached(root)))
    own, rows = theirs.condition(ALL), ours.condition(ALL)
    assert set(rows) == {"text"}
    assert torch.equal(rows["text"], own["text"])
    assert torch.equal(ours.null(rows)["text"], theirs.null(own)["text"])
    half = prompts(root, cached(root, "fp16")).open().condition(ALL)["text"]
    assert torch.equal(half, own["text"].half().float())
    assert not torch.equal(half, own["text"])


def test_factors_are_the_nearest_of_their_rank(root: Path, tmp_path: Path):
    """In the largest singular value that is left out (Eckart and Young 1936), up to float16's 2^-11."""
    tokens = prompts(root, encoder(root)).open().condition(ALL)["text"]
    left, right = factors(tokens[0], 3)
    assert (left.shape, right.shape, left.dtype) == ((9, 3), (3, 8), torch.float16)
    values = torch.linalg.svdvals(tokens[0])
    off = torch.linalg.matrix_norm(left.float() @ right.float() - tokens[0], 2)
    torch.testing.assert_close(off, values[3], rtol=0, atol=float(values[0]) * 2**-10)
    spec = prompts(root, encoder(root))
    write_embedded(spec.open().text, spec, tmp_path / "factored", rank=10)  # more than a row has
    ours = prompts(root, CachedEncoder(path=str(tmp_path / "factored"))).open()
    torch.testing.assert_close(ours.condition(ALL)["text"], tokens, rtol=0, atol=3e-3)
    null = spec.open().null(spec.open().condition(ALL))["text"]
    torch.testing.assert_close(ours.null(ours.condition(ALL))["text"], null, rtol=0, atol=3e-3)
    assert sorted(p.name for p in (tmp_path / "factored").iterdir()) == sorted(p.name for p in (root / "fp32").iterdir())


def test_a_list_in_another_order_has_the_rows_of_its_prompts(root: Path, tmp_path: Path):
    some = [WORDS[2], WORDS[0], WORDS[2]]
    rows = embed(cached(root), some, cache=str(tmp_path)).take(torch.arange(3))["text"]
    assert torch.equal(rows, prompts(root, encoder(root)).open().condition(torch.tensor([2, 0, 2]))["text"])


def test_a_prompt_that_is_not_there_names_the_encoder_and_takes_it(root: Path, tmp_path: Path):
    key = encoder(root).key()
    said = refused(cached(root), tmp_path, "banana", "blue cheese")
    assert said == (
        f"encoder {root / 'fp32'}: has no embedding of 'blue cheese', only those of its 6 prompts, in prompts.json; any "
        f'other needs the encoder that made them, model (sentence, length 9, keys ["text"], sha256 {key[:16]}…): name '
        "its folder, `fewstep sample --encoder FOLDER`, or data.encoder.encoder=FOLDER in a recipe"
    )
    named = with_encoder(prompts(root, cached(root)), str(root / "model")).encoder
    rows = embed(named, ["banana", "blue cheese"], cache=str(tmp_path / "both")).take(torch.arange(2))["text"]
    own = embed(encoder(root), ["banana", "blue cheese"], cache=str(tmp_path / "own")).take(torch.arange(2))["text"]
    torch.testing.assert_close(rows, own, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="these data have an encoder of their own, sentence; leave it out"):
        with_encoder(prompts(root, encoder(root)), str(root / "model"))


def test_another_encoder_is_refused(root: Path, tmp_path: Path):
    shutil.copytree(root / "model", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    said = refused(cached(root, encoder=str(tmp_path / "model")), tmp_path, "blue cheese")
    assert f"{tmp_path / 'model'} is not that one (sha256 {encoder(tmp_path).key()[:16]}…)" in said


def test_the_folder_names_the_encoder_without_its_place(root: Path, tmp_path: Path):
    told = read_json(root / "fp16" / NAME)
    assert told["encoder"] == {"name": "sentence", "length": 9, "keys": ["text"], "path": "model"}
    assert told["prompts"] == [*WORDS, ""]
    assert str(root) not in "".join(p.read_text() for p in (root / "fp16").glob("*.json"))
    assert (cached(root).length, cached(root).zeros_for_empty()) == (9, False)
    spec = prompts(root, cached(root))
    with pytest.raises(UserError, match="is such a folder already; copy it"):
        write_embedded(spec.open().text, spec, tmp_path / "again")


def test_a_folder_that_is_not_whole_is_refused_by_file(root: Path, tmp_path: Path):
    def broken(name: str) -> Path:
        return Path(shutil.copytree(root / "fp32", tmp_path / name))

    def said(folder: Path) -> str:
        return refused(CachedEncoder(path=str(folder)), tmp_path)

    def rewritten(name: str, **changes: Any) -> str:
        folder = broken(name)
        told = {k: v for k, v in {**read_json(folder / NAME), **changes}.items() if v is not None}
        (folder / NAME).write_text(json.dumps(told))
        return said(folder).removeprefix(f"{folder / NAME}: ")

    cut = broken("cut") / "00000.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    assert said(cut.parent) == f"{cut}: is damaged, its checksum differs; delete this file and make it again"
    gone = broken("gone")
    (gone / "00000.safetensors").unlink()
    assert said(gone) == f"{gone / '00000.safetensors'}: is missing; copy the folder again"
    index = broken("index")
    (index / "index.json").unlink()
    assert said(index) == f"{index}: holds no index.json; it is not a folder that fewstep has made"
    spec = prompts(root, encoder(root))
    write_embedded(spec.open().text, spec, tmp_path / "half", rank=2)
    rows, told = tmp_path / "half" / "00000.safetensors", read_json(tmp_path / "half" / "index.json")
    save_file({k: v for k, v in load_file(rows).items() if k != "text_right"}, rows)
    told["shards"]["0"] = [rows.stat().st_size, crc32_of(rows)]
    (tmp_path / "half" / "index.json").write_text(json.dumps(told))
    half = f"{tmp_path / 'half'}: its rows have one factor of text and not the other; copy the folder again"
    assert said(tmp_path / "half") == half
    odd = broken("odd")
    (odd / NAME).write_text(json.dumps({**read_json(odd / NAME), "encoder": {"name": "sentence", "lenght": 3}}))
    named = CachedEncoder(path=str(odd), encoder=str(root / "model"))
    assert refused(named, tmp_path, "kiwi").startswith(f"{odd / NAME}: encoder: ")
    bare = broken("bare")
    (bare / NAME).unlink()
    assert (
        said(bare)
        == f"{bare / NAME}: is missing; `fewstep cache-text RECIPE --out FOLDER` writes it beside the embeddings"
    )
    assert said(tmp_path / "none").endswith("no such folder; `fewstep cache-text RECIPE --out FOLDER` writes one")
    assert rewritten("a", encoder=None) == "encoder is missing, expected keys; copy the folder again"
    assert rewritten("b", zeros="no") == 'zeros is "no", expected true or false; copy the folder again'
    assert rewritten("c", prompts=WORDS) == "has 6 prompts, and index.json 7 rows; copy the folder again"
    assert "prompts are not all texts" in rewritten("d", prompts=[*WORDS, 3])
    assert "encoder.name is not known" in rewritten("e", encoder={"name": "nobodys"})


def test_the_shipped_embeddings_are_those_of_the_shipped_captions():
    data: Any = load("emoji-dmd2").data
    assert isinstance(data, Captions)
    folder = expanded(data.encoder.path)
    captions = [json.loads(line)["text"] for line in (expanded(data.path) / "captions.jsonl").read_text().splitlines()]
    told, index = read_json(folder / NAME), read_json(folder / "index.json")
    assert len(captions) == 131
    assert told["prompts"] == [*captions, ""]
    assert tuple(captions) == Retrieval.load("assets:emoji/retrieval").captions
    assert told["encoder"] == {"name": "sentence", "length": 77, "keys": ["text"], "path": "all-MiniLM-L6-v2"}
    made = "852d031e81868b3fe72d86714cb639e62ff68fbb5d8e80d5584f10ff50fb25e3-77-None-text"
    assert index["made_with"]["encoder"] == made
    assert index["made_with"]["rank"] == 16
    (file,) = data.encoder.files()[2:]
    with safe_open(file, framework="pt") as opened:
        left, right = opened.get_tensor("text_left"), opened.get_tensor("text_right")
    assert (left.shape, right.shape) == ((132 * 77, 16), (132, 16, 384))
    assert left.dtype == right.dtype == torch.float16
    assert bool(torch.isfinite(left).all())
    assert bool(torch.isfinite(right).all())
    assert sum(f.stat().st_size for f in data.encoder.files()) < 2_000_000
