"""Files written: whole or not at all, and what a killed process left of it cleared."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEFTOVER = re.compile(r"\..+\.(\d+)\.fewstep-tmp(\.\w+)?")
"""Names of what is written aside; the number is the process that writes it."""


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
