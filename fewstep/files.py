"""Files: checksums, atomic writes, the user's cache, the commit that runs."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


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


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block succeeds and removed when it fails."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
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
