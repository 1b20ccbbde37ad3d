"""Shared by the tests of pictures: files of every kind that people have, most of them written by hand."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 0, **chunks: bytes) -> bytes:
    """A PNG as its parts say, true or not: `rows` are filter bytes and samples, `chunks` stand before them."""

    def chunk(name: str, data: bytes) -> bytes:
        raw = name.encode() + data
        return struct.pack(">I", len(data)) + raw + struct.pack(">I", zlib.crc32(raw))

    parts = chunk("IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    parts += b"".join(chunk(name, data) for name, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + parts + chunk("IDAT", zlib.compress(rows)) + chunk("IEND", b"")


def deep_png(values: np.ndarray) -> bytes:
    """16 bits a channel, (h, w) or (h, w, 3), which Pillow reads and does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], rows, 16, 2 if values.ndim == 3 else 0)


def tiff(width: int, height: int, data: bytes, bits: int, **tags: int) -> bytes:
    """A grey TIFF of raw samples, which Pillow reads and does not write; tags by number as `t262=0`."""
    told = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 277: 1, 278: height, 279: len(data)}
    told |= {int(key[1:]): value for key, value in tags.items()}
    told[273] = 8 + 2 + 12 * (len(told) + 1) + 4
    rows = b"".join(struct.pack("<HHII", key, 4, 1, told[key]) for key in sorted(told))
    return b"II*\0" + struct.pack("<IH", 8, len(told)) + rows + struct.pack("<I", 0) + data


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write(folder: Path, **files: bytes | Image.Image) -> Path:
    """Files by name, whose first underscore stands for the dot; pictures as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else encoded(content)
        (folder / name.replace("_", ".", 1)).write_bytes(data)
    return folder
