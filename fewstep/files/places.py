"""Places: a home written out, the user's cache, the commit that runs."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path

from fewstep.config import UserError


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with ~ and ~user written out; `assets:NAME` is what ships with fewstep. UserError for an unknown user."""
    told = os.fspath(path)
    if told.startswith("assets:"):
        return Path(str(files("fewstep.assets"))) / told.removeprefix("assets:")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error}") from None


def cache_dir(*parts: str) -> Path:
    """The folder `parts` inside the cache, created on demand.

    ``FEWSTEP_CACHE`` wins; otherwise the platform's convention (``XDG_CACHE_HOME`` or ``~/.cache`` on Linux,
    ``~/Library/Caches`` on macOS, ``%LOCALAPPDATA%`` on Windows), with ``fewstep`` appended.

    Raises:
        PermissionError: the folder can be written by every user of the machine.
    """
    if chosen := os.environ.get("FEWSTEP_CACHE"):
        root = expanded(chosen)
    elif sys.platform == "darwin":
        root = expanded("~") / "Library" / "Caches" / "fewstep"
    elif os.name == "nt":
        root = Path(os.environ.get("LOCALAPPDATA", expanded("~") / "AppData" / "Local")) / "fewstep" / "Cache"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or expanded("~") / ".cache") / "fewstep"
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


@cache
def dirty() -> bool:
    """Whether the checkout's code or recipes are not those of `commit()`; False where there is no checkout."""
    if commit() == "unknown":
        return False
    root = Path(__file__).resolve().parents[2]
    told = subprocess.run(
        ["git", "-C", str(root), "status", "--porcelain", "--", "fewstep", "kernels", "eval", "recipes"],
        capture_output=True,
        text=True,
        check=False,
    )
    return bool(told.stdout.strip())
