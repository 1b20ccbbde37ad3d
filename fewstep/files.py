"""Files: checksums, atomic writes, folders that are ours, the user's cache, the commit that runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fewstep.config import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def crc32_of(path: Path) -> int:
    """CRC-32 of a file's bytes, read in pieces."""
    value = 0
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


@cache
def commit() -> str:
    """The checkout's commit, 40 hex digits; "unknown" without git or where fewstep is installed without its history."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        # An environment inside somebody's own repository is not a checkout of fewstep.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        told = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.stdout.strip()


def cache_dir(*parts: str) -> Path:
    """The folder `parts` inside the cache, created on demand.

    ``FEWSTEP_CACHE`` wins; otherwise the platform's convention (``XDG_CACHE_HOME`` or ``~/.cache`` on Linux,
    ``~/Library/Caches`` on macOS, ``%LOCALAPPDATA%`` on Windows), with ``fewstep`` appended.

    Raises:
        PermissionError: the folder can be written by every user of the machine.
    """
    if chosen := os.environ.get("FEWSTEP_CACHE"):
        root = Path(chosen).expanduser()
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches" / "fewstep"
    elif os.name == "nt":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "fewstep" / "Cache"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep"
    root.mkdir(parents=True, exist_ok=True)
    refuse_world_writable(root)
    folder = root.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def refuse_world_writable(folder: Path) -> None:
    """Raise PermissionError when any user may write in `folder`: network weights there could be anybody's."""
    if os.name != "nt" and folder.stat().st_mode & stat.S_IWOTH:
        raise PermissionError(
            f"{folder}: the folder is world-writable, so its files cannot be trusted; "
            "use a folder of your own (FEWSTEP_CACHE) or remove the write permission of others"
        )


BLOCK = 4096
"""Bytes of a sample in `digest_of`."""
SPREAD = (".safetensors", ".tar")
"""Files whose ends tell little: a header that another training writes again, a tail of padding."""
WHOLE = (".json", ".jsonl", ".txt")
"""Files of words, in which any line may change while the size stays."""


def digest_of(paths: Iterable[Path]) -> str:
    """`N files, B bytes, sha256 ...`: what tells one set of files from another at little cost.

    Hashed are names, relative to the folder that holds all, so that it may move; sizes; the first and last 4 KiB of
    every file, with a dozen blocks spread evenly between for SPREAD, and all of WHOLE. It finds another file and a save
    over it, not a forger. UserError names a file that cannot be read.
    """
    files = sorted(p.absolute() for p in paths)
    root = os.path.commonpath([p.parent for p in files]) if files else ""
    digest, total = hashlib.sha256(), 0
    for path in files:
        try:
            with path.open("rb") as f:
                size = os.fstat(f.fileno()).st_size
                digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode("utf-8", "surrogateescape"))
                for start, length in _samples(path.suffix.lower(), size):
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
    level, depth = [data], 0
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        if depth > JSON_DEPTH:
            raise UserError(f"{name}: cannot be read as JSON: is nested deeper than {JSON_DEPTH}")
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v)]
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, as `parse_json` reads it. UserError names the file."""
    try:
        size = path.stat().st_size
        text = path.read_bytes() if size <= JSON_BYTES else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as JSON: {error.strerror}") from None
    if text is None:
        raise UserError(f"{path}: cannot be read as JSON: has {size} bytes, more than {JSON_BYTES}")
    data = parse_json(text, path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object")
    return data


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block succeeds and removed when it fails."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    suffix = f".{os.getpid()}.fewstep-tmp{target.suffix}"
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes a 0600 file; a published statistics file should follow the user's umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


LOCK = ".fewstep-lock"
"""The file that `locked` locks."""
MARK = ".fewstep"
"""The file by which fewstep knows a folder that it made, and what it wrote there."""
LEFTOVER = re.compile(r"\..+\.(\d+)\.fewstep-tmp(\.\w+)?")
"""Names of what is written aside; the number is the process that writes it."""


def aside_name(name: str) -> str:
    """The hidden name under which this process writes `name` until it is whole; `clear_leftovers` knows it."""
    return f".{name}.{os.getpid()}.fewstep-tmp"


def clear_leftovers(folder: Path) -> None:
    """Remove what processes that are gone left half-written in `folder`; a running one's stays."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = LEFTOVER.fullmatch(path.name)
        if match is None or _runs(int(match[1])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        pass
    return True


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
    """An empty folder that becomes `folder`, marked as a `kind`, after the block, nothing if that fails. UserError."""
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
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep a folder to this process while the block runs; freed also by a process that dies.

    Raises UserError naming the process that has it. Where the file system has no locks nothing is kept.
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


def text_of(data: bytes, name: object) -> str:
    """UTF-8 text without the byte-order mark that Windows' editors put in front of it.

    Raises:
        ValueError: other bytes; the message names the line and `name`, the file.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        what = "is UTF-16" if wide else f"byte {error.start} is no UTF-8"
        raise ValueError(f"{name}:{line}: {what}; save the file as UTF-8") from None


def lines_of(text: str) -> list[str]:
    """Lines that end at a line feed, alone or after a carriage return, and nowhere else.

    `str.splitlines` also ends them at U+2028, U+0085, a vertical tab and a form feed, which captions hold.
    """
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
