"""Tensors computed once and kept: numbered safetensors files with an index, resumable, checked, bound to their origin."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.config import UserError
from fewstep.files import crc32_of


def sha256_of(files: Iterable[Path], root: Path) -> str:
    """Hash over the names (relative to `root`) and contents of files, 64 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(root)).encode())
        with path.open("rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


class Shards:
    """`count` rows of named tensors in files of `rows` rows each.

    Args:
        folder: made if it is not there.
        made_with: facts that the rows depend on, such as the hash of the encoder; a folder with others is refused.
        count: rows in all.
        rows: rows per file.
        remedy: what a message tells the user to do about a folder that does not fit.

    Raises UserError for a folder of other facts, and naming the file for one that is damaged.
    """

    def __init__(
        self,
        folder: Path,
        made_with: Mapping[str, Any],
        count: int,
        rows: int = 256,
        remedy: str = "delete it",
    ) -> None:
        self.folder, self.made_with, self.count, self.rows = folder, dict(made_with), count, rows
        self.remedy = remedy
        self.done: dict[str, list[int]] = {}
        self._open: dict[int, dict[str, Tensor]] = {}
        index = folder / "index.json"
        if index.is_file():
            told = read_index(folder)
            for key, value in self.made_with.items():
                if told["made_with"].get(key) != value:
                    raise UserError(
                        f"{folder}: was made with another {key}, {_short(told['made_with'].get(key))} instead of "
                        f"{_short(value)}; {remedy}"
                    )
            if told["count"] != count:
                raise UserError(f"{folder}: holds {told['count']} rows, {count} are needed; {remedy}")
            self.rows, self.done = told["rows"], told["shards"]

    def __len__(self) -> int:
        return self.count

    def missing(self) -> list[range]:
        """The rows of every file that is not there yet, in order."""
        starts = range(0, self.count, self.rows)
        return [
            range(a, min(a + self.rows, self.count))
            for n, a in enumerate(starts)
            if str(n) not in self.done or not self._path(n).is_file()
        ]

    def write(self, rows: range, tensors: Mapping[str, Tensor]) -> None:
        """Write one file of `missing()`; it counts only when it is whole."""
        n = rows.start // self.rows
        if any(len(t) != len(rows) for t in tensors.values()):
            raise ValueError(f"{len(rows)} rows are needed, got {[len(t) for t in tensors.values()]}")
        self.folder.mkdir(parents=True, exist_ok=True)
        path, aside = self._path(n), self._path(n).with_suffix(".tmp")
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside)
        os.replace(aside, path)
        self.done[str(n)] = [path.stat().st_size, crc32_of(path)]
        told = {"made_with": self.made_with, "count": self.count, "rows": self.rows, "shards": self.done}
        aside = self.folder / "index.tmp"
        aside.write_text(json.dumps(told, indent=1))
        os.replace(aside, self.folder / "index.json")

    def check(self) -> None:
        """Refuse a folder that is not whole: sizes and checksums of all files."""
        missing = self.missing()
        if missing:
            raise UserError(
                f"{self.folder}: holds {self.count - sum(map(len, missing))} of {self.count} rows; run the command that "
                "makes it again, it goes on where it stopped"
            )
        for n, (size, crc) in self.done.items():
            path = self._path(int(n))
            if path.stat().st_size != size or crc32_of(path) != crc:
                raise UserError(
                    f"{path}: is damaged, its checksum differs; delete this file and make it again"
                )

    def take(self, k: Tensor) -> dict[str, Tensor]:
        """Rows by number, int64 (b,) -> tensors (b, ...) on the CPU."""
        picked = [(self._shard(i // self.rows), i % self.rows) for i in k.tolist()]
        return {name: torch.stack([s[name][i] for s, i in picked]) for name in picked[0][0]}

    def _shard(self, n: int) -> dict[str, Tensor]:
        if n not in self._open:
            try:
                self._open[n] = load_file(self._path(n))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self._path(n)}: cannot be read: {error}; {self.remedy}") from None
        return self._open[n]

    def _path(self, n: int) -> Path:
        return self.folder / f"{n:05d}.safetensors"


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a folder of shards. Raises UserError when there is none or it is not one."""
    index = folder / "index.json"
    if not index.is_file():
        raise UserError(f"{folder}: holds no index.json; it is not a folder that fewstep has made")
    try:
        told = json.loads(index.read_text())
        told["made_with"], told["count"], told["rows"], told["shards"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: cannot be read: {error}") from None
    return told


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text
