"""Real pictures that samples are compared with, read when they are asked for and known by a digest of their contents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.files import file_sha256
from fewstep.pictures import SUFFIXES, PictureError, flat, list_pictures, load, pixels, square

LIMIT = 20_000
"""Pictures of a reference; of more, these many spread evenly."""


@dataclass(frozen=True, kw_only=True)
class RealPictures:
    """Pictures by number.

    Attributes:
        name: a word for file names and presets; about: what is printed beside a number.
        read: rows -> uint8 (b, C, H, W), all of one size.
        digest: of the contents of rows, 64 hex digits.
        labels: (count,) int64 where they have classes.
    """

    name: str
    about: str
    count: int
    read: Callable[[Sequence[int]], Tensor]
    digest: Callable[[Sequence[int]], str]
    labels: Tensor | None = None

    def rows(self) -> list[int]:
        """Those that are used: all, or `LIMIT` of them."""
        used = min(self.count, LIMIT)
        return [i * self.count // used for i in range(used)]


def tensor_digest(images: Tensor) -> str:
    """SHA-256 over shape, type and values."""
    whole = hashlib.sha256(f"{images.dtype}:{tuple(images.shape)}".encode())
    whole.update(np.ascontiguousarray(images.cpu().numpy()).tobytes())
    return whole.hexdigest()


def folder_pictures(folder: Path, side: int, channels: int) -> RealPictures:
    """The pictures of a folder, whatever their size and kind: the middle square of each, resized to `side` (Lanczos).

    Raises:
        PictureError: no such folder, no pictures in it, or, when they are read, one that will not do.
    """
    listing = list_pictures(folder)
    files = listing.files
    if len(files) < 2:
        raise PictureError(folder, f"{len(files)} pictures ({', '.join(SUFFIXES)}) in it, at least 2 are needed")

    def read(rows: Sequence[int]) -> Tensor:
        squares = [square(flat(*load(files[i], files[i]), channels, files[i]), side) for i in rows]
        return torch.from_numpy(np.stack([pixels(s) for s in squares]))

    def digest(rows: Sequence[int]) -> str:
        whole = hashlib.sha256(f"centre square, lanczos, {side}, {channels}".encode())
        for i in rows:
            whole.update(file_sha256(files[i]).encode())
        return whole.hexdigest()

    about = f"{folder}, the middle of each resized to {side} x {side} (lanczos)"
    return RealPictures(name=folder.resolve().name, about=about, count=len(files), read=read, digest=digest)
