"""Files read: checksums, digests, JSON within limits, text."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from fewstep.config import UserError


def regular(path: str | os.PathLike[str]) -> Path:
    """The path of a file or folder. UserError for a pipe, a device and a socket, which a reader would wait for."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # whoever opens it says so
        return Path(path)
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a pipe, a device or a socket and no file; remove it, or put the file there")
    return Path(path)


def crc32_of(path: Path) -> int:
    """CRC-32 of a file's bytes, read in pieces."""
    value = 0
    with regular(path).open("rb") as f:
        while chunk := f.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with regular(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


BLOCK = 4096
"""Bytes of a sample in `digest_of`."""
SPREAD = (".safetensors", ".tar", ".bmp", ".tif", ".tiff")
"""Files whose ends tell little: a header that another training writes again, a tail of padding, pixels as they are."""
WHOLE = (".json", ".jsonl", ".txt")
"""Files of words, in which any line may change while the size stays."""


def digest_of(paths: Iterable[Path]) -> str:
    """`N files, B bytes, sha256 ...`: what tells one set of files from another at little cost.

    Hashed are names, relative to the folder that holds all, so that it may move; sizes; the first and last 4 KiB of
    every file, with a dozen blocks spread evenly between for SPREAD, all of WHOLE and of what is small in a tar. It finds
    another file and a save over it, not a forger. UserError names a file that cannot be read.
    """
    files = sorted(p.absolute() for p in paths)
    root = os.path.commonpath([p.parent for p in files]) if files else ""
    digest, total = hashlib.sha256(), 0
    for path in files:
        try:
            with regular(path).open("rb") as f:
                size = os.fstat(f.fileno()).st_size
                digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode("utf-8", "surrogateescape"))
                words = _words(f, size) if path.suffix.lower() == ".tar" else []
                for start, length in [*_samples(path.suffix.lower(), size), *words]:
                    f.seek(start)
                    digest.update(f.read(length))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        total += size
    return f"{len(files)} files, {total} bytes, sha256 {digest.hexdigest()[:16]}"


def _samples(suffix: str, size: int) -> list[tuple[int, int]]:
    """(start, length) of what `digest_of` reads of a file."""
    if suffix in WHOLE or size <= 2 * BLOCK:
        return [(0, size)]
    inner = 12 if suffix in SPREAD else 0
    return [(round(k * (size - BLOCK) / (inner + 1)), BLOCK) for k in range(inner + 2)]


def _words(f: BinaryIO, size: int) -> list[tuple[int, int]]:
    """(start, length) of the members of a tar that have a block or less, captions and classes among them.

    Headers are read by hand, ten times as fast as by tarfile; up to where they are damaged. None of a small tar, which is
    read whole.
    """
    found, at = [], 0
    while size > 2 * BLOCK and at + 512 <= size:
        f.seek(at)
        header = f.read(512)
        try:
            length = int(header[124:136].rstrip(b"\0 ") or b"x", 8)  # no digits: the zeros at the end
        except ValueError:
            break
        if 0 < length <= BLOCK:
            found.append((at + 512, length))
        at += 512 + -(-length // 512) * 512
    return found


JSON_BYTES = 256 << 20
"""Of the largest JSON that is read; an index of a million shards has 40 MiB."""
JSON_DEPTH = 64
"""Objects and lists within each other."""


def parse_json(text: bytes | str, name: object) -> Any:
    """What a JSON text says. UserError, naming it, for anything else, for more than JSON_BYTES and beyond JSON_DEPTH."""
    if len(text) > JSON_BYTES:
        raise UserError(f"{name}: cannot be read as JSON: has {len(text)} bytes, more than {JSON_BYTES}")
    try:
        data = json.loads(text)
    except RecursionError:
        raise UserError(f"{name}: cannot be read as JSON: is nested deeper than {JSON_DEPTH}") from None
    except ValueError as error:  # also bytes that are no UTF-8, and numbers of thousands of digits
        raise UserError(f"{name}: cannot be read as JSON: {error}") from None
    mark = b"\\ud" if isinstance(text, bytes) else "\\ud"
    if mark in text.lower():  # type: ignore[operator]
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            raise UserError(f"{name}: cannot be read as JSON: has {half}, half of a character alone") from None
    level, depth = [data], 0
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        if depth > JSON_DEPTH:
            raise UserError(f"{name}: cannot be read as JSON: is nested deeper than {JSON_DEPTH}")
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v)]
    return data


def prompt_of(line: str, where: object) -> str:
    """The prompt of a line of a .jsonl, an object with a "prompt". UserError, beginning with where, for another."""
    found = parse_json(line, where)
    text = found.get("prompt") if isinstance(found, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: expected {{"prompt": "WORDS"}}, got {line[:60]!r}')
    return text


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, as `parse_json` reads it. UserError names the file."""
    try:
        size = regular(path).stat().st_size
        text = path.read_bytes() if size <= JSON_BYTES else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as JSON: {error.strerror}") from None
    if text is None:
        raise UserError(f"{path}: cannot be read as JSON: has {size} bytes, more than {JSON_BYTES}")
    data = parse_json(text, path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object")
    return data


def text_of(data: bytes, name: object) -> str:
    """UTF-8 text without the byte-order marks that Windows' editors put in front of it, at the start of any line.

    Raises:
        ValueError: other bytes; the message names the line and `name`, the file.
    """
    bare = data.rstrip(b"\0")  # what pads to a block
    data = data if b"\0" in bare else bare
    if (nul := data.find(b"\0")) >= 0 and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        line = data.count(b"\n", 0, nul) + 1
        raise ValueError(f"{name}:{line}: byte {nul} is zero, as in UTF-16 without its mark; save the file as UTF-8")
    try:
        return re.sub("^\ufeff+", "", data.decode("utf-8"), flags=re.MULTILINE)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        what = "is UTF-16" if wide else f"byte {error.start} is no UTF-8"
        raise ValueError(f"{name}:{line}: {what}; save the file as UTF-8") from None


def lines_of(text: str) -> list[str]:
    """Lines that end at a line feed, alone or after a carriage return, and nowhere else.

    `str.splitlines` also ends them at U+2028, U+0085, a vertical tab and a form feed, which captions hold. Where there
    is no line feed at all a carriage return ends them, as in files of old Macs.
    """
    if "\n" not in text:
        text = text.removesuffix("\r").replace("\r", "\n")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
