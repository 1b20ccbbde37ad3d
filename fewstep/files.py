"""Checksums of files."""

from __future__ import annotations

import zlib
from pathlib import Path


def crc32_of(path: Path) -> int:
    """CRC-32 of a file's bytes, read in pieces."""
    value = 0
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value
