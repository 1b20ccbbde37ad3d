"""Folders that are ours: marked, told from others', emptied, kept to one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fewstep.config import UserError
from fewstep.files.read import read_json
from fewstep.files.write import LEFTOVER, aside_name, atomic_path, clear_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


LOCK = ".fewstep-lock"
"""The file that `locked` locks."""
MARK = ".fewstep"
"""The file by which fewstep knows a folder that it made, and what it wrote there."""


def write_mark(folder: Path, kind: str) -> None:
    """Mark a folder as fewstep's, a `kind` of thing, with every file that is in it now as ours.

    For a folder that this process has just made: what others put into it would be taken for ours.
    """
    held = {"made_by": "fewstep", "kind": kind, "files": sorted([*_files(folder), MARK])}
    with atomic_path(folder / MARK) as temporary:
        temporary.write_text(json.dumps(held, indent=1))


def read_mark(folder: Path) -> dict[str, Any] | None:
    """What `write_mark` wrote; None for a folder that fewstep did not make, and for a link to one."""
    path = folder / MARK
    if folder.is_symlink() or path.is_symlink() or not path.is_file():
        return None
    try:
        held = read_json(path)
    except UserError:
        return None
    kind, files = held.get("kind"), held.get("files")
    whole = isinstance(kind, str) and isinstance(files, list) and all(isinstance(f, str) for f in files)
    return held if whole else None


def strangers(folder: Path, ours: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Files in a folder that fewstep did not write, relative to it.

    ours: top-level names that are ours, with a pattern of what they hold where they are folders; marked folders in
    `folder` tell themselves.
    """
    held = read_mark(folder)
    known = set(held["files"]) if held else set()
    found: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and read_mark(path) is not None:
            found += [f"{path.name}/{name}" for name in strangers(path)]
        elif LEFTOVER.fullmatch(path.name):
            continue
        elif path.is_dir() and not path.is_symlink():
            own = re.compile(ours.get(path.name, "(?!)"), re.DOTALL)
            inner = [name for name in _files(path) if not own.fullmatch(name)]
            found += [f"{path.name}/{name}" for name in inner if f"{path.name}/{name}" not in known]
        elif path.name not in known and path.name not in ours:
            found.append(path.name)
    return found


def _files(folder: Path) -> list[str]:
    """Files and links below a folder, as relative posix paths; links are not followed."""
    found = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [Path(root, name).relative_to(folder).as_posix() for name in (*names, *links)]
    return found


def check_ours(folder: Path, kind: str, foreign: str, ours: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuse to replace what fewstep did not make.

    kind: what the folder's mark must say. foreign: the words for one that says otherwise. ours: as `strangers` takes it.

    Raises UserError for a link, for a folder without that mark, and for one that holds somebody else's files.
    """
    if folder.is_symlink():
        raise UserError(f"{folder}: is a symbolic link; fewstep deletes nothing through one. Give the folder itself")
    if (read_mark(folder) or {}).get("kind") != kind:
        raise UserError(f"{folder}: {foreign}")
    if others := strangers(folder, ours):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(f"{folder}: holds {others[0]}{more}, which fewstep did not write; move that away first")


def take(folder: Path, kind: str) -> bool:
    """Make a folder ours for a `kind` of thing: True where it is one already, False where it is new or was empty.

    What killed processes left half-written goes; a link is followed. UserError, with nothing changed, for anything else.
    """
    real = folder.resolve()
    if real.exists() and not real.is_dir():
        raise UserError(f"{folder}: is a file; choose another folder")
    # Listed before the mark is read: another process writes the mark first, so what it has made is not taken for foreign.
    foreign = real.is_dir() and not all(_before_mark(p.name) for p in real.iterdir())
    held = read_mark(real)
    if held is None and foreign:
        raise UserError(f"{folder}: is not empty and no {kind} that fewstep made; choose another folder")
    if held is not None and held["kind"] != kind:
        raise UserError(f"{folder}: is a {held['kind']} that fewstep made and no {kind}; choose another folder")
    real.mkdir(parents=True, exist_ok=True)
    clear_leftovers(real)
    if held is None:
        write_mark(real, kind)
    return held is not None


def _before_mark(name: str) -> bool:
    """Whether a process that was killed may have left a file of this name in a folder before it was marked."""
    return name == LOCK or LEFTOVER.fullmatch(name) is not None


def empty(folder: Path, keep: Collection[str] = ()) -> None:
    """Delete what a folder holds but the top-level names `keep`; links in it are removed, not followed."""
    for path in folder.iterdir():
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def whole_folder(folder: Path, kind: str, what: str) -> Iterator[Path]:
    """An empty folder to write into that becomes `folder`, marked as a `kind`, and vanishes when the block fails.

    what: its name in messages. UserError for a folder that is something else's or that cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another folder")
    if folder.is_symlink() or (folder.is_dir() and any(folder.iterdir())):
        check_ours(folder, kind, f"exists and is not an earlier {what}; choose another folder")
    clear_leftovers(folder.parent)
    aside = folder.with_name(aside_name(folder.name))
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        write_mark(aside, kind)
        shutil.rmtree(folder, ignore_errors=True)  # what stays makes the next line fail
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: the {what} could not be written: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def locked(folder: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Keep a folder to this process while the block runs; freed also by a process that dies.

    UserError names the process that has it, unless it shall `wait`. Where the file system has no locks nothing is kept.
    """
    if fcntl is None:
        yield
        return
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        handle = os.open(folder / LOCK, flags, 0o666)
    except OSError as error:
        raise UserError(f"{folder / LOCK}: cannot be opened: {error.strerror}") from None
    try:
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                time.sleep(0.05)  # `lock_taken` of another process has it for an instant
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(handle, 32).decode("ascii", "replace").strip()
            raise UserError(f"{folder}: {what} by process {pid or 'unknown'}; wait for it or stop it first") from None
        except OSError:
            pass
        else:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def lock_taken(folder: Path) -> bool:
    """True while another process keeps `folder` to itself by `locked`; False also where there are no locks."""
    if fcntl is None or not (folder / LOCK).is_file():
        return False
    with (folder / LOCK).open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
    return False
