"""What is read from files: text of any editor, JSON that can be written again; no pipe is waited for."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fewstep.config import UserError
from fewstep.data.encoders import SentenceEncoder
from fewstep.data.images import ImageFolder
from fewstep.data.latents import vae_hash
from fewstep.data.pictures import Captions, Prompts, WebDataset
from fewstep.data.text import read_prompts
from fewstep.eval.protocol.images import ImageFolder as Measured
from fewstep.eval.protocol.preset import load_preset
from fewstep.eval.protocol.prompts import read_prompts as measured_prompts
from fewstep.eval.protocol.real import folder_pictures
from fewstep.files import crc32_of, digest_of, file_sha256, parse_json, read_json, regular, text_of
from fewstep.networks.weights import check_whole
from fewstep.pictures import PictureError

ENCODER: Any = SentenceEncoder(path="e")


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """A reader that waits for a writer would wait for ever."""

    def late(*_: Any) -> None:
        raise TimeoutError("waits for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("reader", [
    regular, crc32_of, file_sha256, read_json, lambda p: digest_of([p]), lambda p: check_whole(p.parent, "teacher t"),
    lambda p: Prompts(path=str(p), shape=(1, 8, 8), encoder=ENCODER).open(),
    lambda p: vae_hash(str(p.parent)),
])  # fmt: skip
def test_a_pipe_is_refused_by_name(tmp_path: Path, reader: Callable[[Path], Any]):
    (tmp_path / "config.json").write_text("{}")
    path = pipe(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"{path}: is a pipe, a device or a socket and no file"):
        reader(path)


@pytest.mark.parametrize("reader", [
    lambda p: ImageFolder(path=str(p)).open(), lambda p: ImageFolder(path=str(p)).files(),
    lambda p: Captions(path=str(p), size=8).open(), lambda p: Captions(path=str(p), size=8).files(),
    Measured, lambda p: folder_pictures(p, 8, 3),
])  # fmt: skip
@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_among_pictures_is_refused_by_name(tmp_path: Path, reader: Callable[[Path], Any], linked: bool):
    made = pipe(tmp_path / ("elsewhere" if linked else "data/x.png"))
    if linked:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "x.png").symlink_to(made)
    with pytest.raises((UserError, PictureError, ValueError), match=r"data/x\.png: is a pipe, a device or a socket"):
        reader(tmp_path / "data")


def test_a_pipe_beside_pictures_is_passed_over_or_named(tmp_path: Path):
    """What is asked for by name is not there; a pipe under another name is nothing of ours."""
    root = tmp_path / "data"
    pipe(root / "notes.md")
    with pytest.raises(UserError, match="no pictures"):
        Captions(path=str(root), size=8).open()
    pipe(root / "captions.jsonl")
    with pytest.raises(UserError, match=r"captions\.jsonl: is a pipe or a device, expected a file of captions"):
        Captions(path=str(root), size=8).open()
    with pytest.raises(UserError, match=r"told\.jsonl: is a pipe or a device, expected a file of captions"):
        Captions(path=str(root), size=8, captions=pipe(root / "told.jsonl").name).open()
    with pytest.raises(UserError, match=r"shards .*0\.tar is missing"):
        WebDataset(shards=str(pipe(tmp_path / "0.tar").parent / "{0..0}.tar"), size=8).open()


@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        (b"red\rgreen\r", ["red", "green"]),  # old Macs
        (b"red\r\ngreen\r\n", ["red", "green"]),
        (b"red\ngreen\0\0", ["red", "green"]),  # padded to a block
        (b"\xef\xbb\xbf\xef\xbb\xbfred\n\xef\xbb\xbfgreen\n", ["red", "green"]),  # two files joined
        (b"red\n\xc2\xa0\n\xe3\x80\x80\ngreen", ["red", "green"]),  # blank, but not to ASCII
        ("a\u2028b\x0bc\n".encode(), ["a\u2028b\x0bc"]),
    ],
)
def test_prompts_of_any_editor_are_its_lines(tmp_path: Path, data: bytes, prompts: list[str]):
    path = tmp_path / "p.txt"
    path.write_bytes(data)
    assert read_prompts(path) == prompts


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_told_with_a_mark_and_without(tmp_path: Path, encoding: str):
    with pytest.raises(ValueError, match=r"^p\.txt:1: .*UTF-16.*; save the file as UTF-8$"):
        text_of("red\ngreen\n".encode(encoding), "p.txt")
    path = tmp_path / "mine.yaml"
    path.write_bytes("name: mine\n".encode(encoding))
    with pytest.raises(ValueError, match=r"mine\.yaml:1: .*UTF-16.*; save the file as UTF-8"):
        load_preset(path)


def test_prompts_of_a_jsonl_are_those_that_an_evaluation_reads(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a red apple"}\n\n{"prompt": "pear", "seed": 3}\n')
    assert read_prompts(path) == ["a red apple", "pear"]
    path.write_text('{"prompt": "a red apple"}\n{"prompt": "pear", "seed": 3}\n')
    assert read_prompts(path) == measured_prompts(path, 2)
    for line in ('{"text": "pear"}', '"pear"', '{"prompt": 3}', '{"prompt": " "}'):
        path.write_text(f'{{"prompt": "apple"}}\n{line}\n')
        with pytest.raises(UserError, match=r'p\.jsonl:2: expected \{"prompt": "WORDS"\}'):
            read_prompts(path)


def test_half_a_character_is_refused_where_it_is_read():
    """No encoder takes it, and no file can be written with it."""
    assert parse_json('{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}
    for text in ('{"a": ["\\ud83d"]}', b'{"\\uDE00": 1}'):
        with pytest.raises(UserError, match=r"^x: cannot be read as JSON: has \\ud[8e][30][d0], half of a character"):
            parse_json(text, "x")
