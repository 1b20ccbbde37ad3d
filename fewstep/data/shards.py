"""Tensors computed once and kept: numbered safetensors files with an index, resumable, checked, bound to their origin."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.config import UserError
from fewstep.files import atomic_path, crc32_of, locked, read_json, regular, take

KIND = "folder of shards"
OPEN = 64
"""Files of one folder that stay mapped into memory; rows are read from them one by one."""


def sha256_of(files: Iterable[Path], root: Path) -> str:
    """Hash over the names (relative to `root`) and contents of files, 64 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(root)).encode())
        with regular(path).open("rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


class Sparse(NamedTuple):
    """One row (n, ...) without those of its n entries that are zero throughout, such as padding."""

    kept: Tensor
    """(m, ...)."""
    at: Tensor
    """(m,) int32, where they stand."""
    length: int
    """n."""


def sparse(row: Tensor) -> Sparse:
    """A row (n, ...) as it is stored; reading gives the same row."""
    at = (row if row.ndim == 1 else (row != 0).flatten(1).any(1)).nonzero().squeeze(1)
    return Sparse(row[at], at.int(), len(row))


class Shards:
    """`count` rows of named tensors in files of `rows` rows each.

    Args:
        folder: made if it is not there.
        made_with: facts that the rows depend on, such as the hash of the encoder; a folder with others is refused.
        count: rows in all.
        rows: rows per file.
        remedy: what a message tells the user to do about a folder that does not fit.

    Several processes may fill one folder: `claimed` lets one of them work while the others wait, and what is written
    without it is still whole. Raises UserError for a folder of other facts, and naming the file for one that is
    damaged.
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
        self.notes: dict[str, Any] = {}
        self.done: dict[str, list[int]] = {}
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._locked = False
        self._read()

    def _read(self) -> None:
        """What the index says by now."""
        if not (self.folder / "index.json").is_file():
            return
        told = read_index(self.folder)
        for key, value in self.made_with.items():
            if told["made_with"].get(key) != value:
                raise UserError(
                    f"{self.folder}: was made with another {key}, {_short(told['made_with'].get(key))} instead of "
                    f"{_short(value)}; {self.remedy}"
                )
        if told["count"] != self.count:
            raise UserError(f"{self.folder}: holds {told['count']} rows, {self.count} are needed; {self.remedy}")
        self.rows, self.done = told["rows"], told["shards"]

    def __len__(self) -> int:
        return self.count

    def missing(self) -> list[range]:
        """The rows of every file that is not there yet, in order."""
        starts = range(0, self.count, self.rows)
        return [
            range(a, min(a + self.rows, self.count))
            for n, a in enumerate(starts)
            if str(n) not in self.done or not self.path(n).is_file()
        ]

    @contextmanager
    def claimed(self) -> Iterator[list[range]]:
        """`missing()` for one process at a time: whoever comes second waits and then finds what is done by then.

        A whole folder is not locked, so that a read-only one serves. Where the file system has no locks, all work.
        """
        if not self.missing():
            yield []
            return
        with self._lock():
            self._read()
            yield self.missing()

    def note(self, notes: Mapping[str, Any]) -> None:
        """Tell in the index, beside the facts, what no row depends on: a folder with others is taken up and gets these.

        A note that is empty goes. A folder that may not be written keeps what it has.
        """
        self.notes = {key: value for key, value in notes.items() if value}
        index = self.folder / "index.json"
        if not index.is_file():
            return
        if all(read_index(self.folder)["made_with"].get(key, "") == value for key, value in notes.items()):
            return
        with suppress(OSError, UserError), self._lock():
            told = read_index(self.folder)
            others = {key: value for key, value in told["made_with"].items() if key not in notes}
            with atomic_path(index) as aside:
                aside.write_text(json.dumps(told | {"made_with": others | self.notes}, indent=1))

    def write(self, rows: range, tensors: Mapping[str, Tensor | Sequence[Sparse]]) -> None:
        """Write one file of `missing()`; it counts only when it is whole. One that is there by now is kept.

        tensors: rows (b, ...) by name, or a list of rows that may differ in their first size.
        """
        n = rows.start // self.rows
        if any(len(t) != len(rows) for t in tensors.values()):
            raise ValueError(f"{len(rows)} rows are needed, got {[len(t) for t in tensors.values()]}")
        with self._lock():
            self._read()
            path = self.path(n)
            if str(n) in self.done and path.is_file():
                return
            with atomic_path(path) as aside:
                save_file({k: v.detach().cpu().contiguous() for k, v in _flat(tensors).items()}, aside)
            self.done[str(n)] = [path.stat().st_size, crc32_of(path)]
            told = {"made_with": self.made_with | self.notes, "count": self.count, "rows": self.rows, "shards": self.done}
            with atomic_path(self.folder / "index.json") as aside:
                aside.write_text(json.dumps(told, indent=1))

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """The folder for this object alone, among threads and processes; freed also by a process that dies."""
        if self._locked:
            yield
            return
        take(self.folder, KIND)
        with locked(self.folder, "is being filled", wait=True):
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def check(self) -> None:
        """Refuse a folder that is not whole: sizes and checksums of all files."""
        missing = self.missing()
        if missing:
            raise UserError(
                f"{self.folder}: holds {self.count - sum(map(len, missing))} of {self.count} rows; run the command that "
                "makes it again, it goes on where it stopped"
            )
        for n, (size, crc) in self.done.items():
            path = self.path(int(n))
            if path.stat().st_size != size or crc32_of(path) != crc:
                raise UserError(f"{path}: is damaged, its checksum differs; delete this file and make it again")

    def take(self, k: Tensor) -> dict[str, Tensor]:
        """Rows by number, int64 (b,) -> tensors (b, ...) on the CPU. Of a file only these rows are read.

        Rows of different files may differ in their first size; they are padded with zeros to the longest.
        """
        rows = [self._row(i // self.rows, i % self.rows) for i in k.tolist()]
        return {name: _stacked([r[name] for r in rows]) for name in rows[0]}

    def _row(self, n: int, i: int) -> dict[str, Tensor]:
        try:
            if n not in self._open:
                self._open[n] = safe_open(self.path(n), framework="pt")
            self._open.move_to_end(n)
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
            file = self._open[n]
            names = set(file.keys())
            return {
                name: _dense(file, name, i) if f"{name}.at" in names else file.get_slice(name)[i]
                for name in sorted(names)
                if "." not in name
            }
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path(n)}: cannot be read: {error}; {self.remedy}") from None

    def path(self, n: int) -> Path:
        """The file of that number."""
        return self.folder / f"{n:05d}.safetensors"


def _flat(tensors: Mapping[str, Tensor | Sequence[Sparse]]) -> dict[str, Tensor]:
    """What a file holds: of sparse rows all entries, where each stands in its row, and (b, 2) of ends and lengths."""
    flat: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            flat[name] = value
            continue
        ends = torch.tensor([len(row.at) for row in value]).cumsum(0)
        flat[name] = torch.cat([row.kept for row in value])
        flat[f"{name}.at"] = torch.cat([row.at for row in value])
        flat[f"{name}.ends"] = torch.stack((ends, torch.tensor([row.length for row in value])), 1)
    return flat


def _dense(file: Any, name: str, i: int) -> Tensor:
    """A sparse row as it was."""
    ends = file.get_slice(f"{name}.ends")[max(i - 1, 0) : i + 1].tolist()
    first, (last, length) = ends[0][0] if i else 0, ends[-1]
    kept = file.get_slice(name)[first:last]
    row = kept.new_zeros(length, *kept.shape[1:])
    row[file.get_slice(f"{name}.at")[first:last].long()] = kept
    return row


def _stacked(rows: list[Tensor]) -> Tensor:
    longest = max((len(r) for r in rows if r.ndim), default=0)
    return torch.stack([r if not r.ndim or len(r) == longest else longer(r, longest) for r in rows])


def longer(rows: Tensor, length: int) -> Tensor:
    """(n, ...) padded with zeros to (length, ...)."""
    return torch.cat((rows, rows.new_zeros(length - len(rows), *rows.shape[1:])))


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a folder of shards. Raises UserError when there is none or it is not one."""
    index = folder / "index.json"
    if not index.is_file():
        raise UserError(f"{folder}: holds no index.json; it is not a folder that fewstep has made")
    told = read_json(index)
    counts, shards = [told.get("count"), told.get("rows")], told.get("shards")
    whole = isinstance(told.get("made_with"), dict) and all(type(n) is int and 0 < n < 1 << 40 for n in counts)
    if not whole or not isinstance(shards, dict) or not all(map(_entry, shards.items())):
        raise UserError(f"{index}: cannot be read: made_with, count, rows or shards is not as fewstep writes it")
    return told


def _entry(item: tuple[str, Any]) -> bool:
    """Whether an entry of the index is a file's number with size and checksum."""
    number, value = item
    sizes = isinstance(value, list) and len(value) == 2 and all(type(n) is int and n >= 0 for n in value)
    return sizes and number.isascii() and number.isdigit() and len(number) < 13


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text
