"""Code that a recipe names (`wrapper:`, `factory:`): known by its hash, and run only where that was asked for."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.config import UserError
from fewstep.files import atomic_path, cache_dir, file_sha256, read_json

KEYS = ("wrapper", "factory")
"""Fields of a teacher or a network whose value is code, `module:Name` or `file.py:Name`."""
_allowed: set[tuple[str, str]] = set()
_everything = [False]


def named(recipe: Any) -> dict[str, str]:
    """The code that a recipe's roles name, value by key such as `teacher.wrapper`; empty for most."""
    found: dict[str, str] = {}
    for role in recipe.role_names():
        found |= named_by(f"roles.{role}" if role in recipe.roles else role, recipe.spec(role))
    return found


def named_by(key: str, spec: Any) -> dict[str, str]:
    """The code that the spec of a role under `key` names, and the spec of its members."""
    values = {f"{key}.{name}": getattr(spec, name, None) for name in KEYS}
    found = {where: value for where, value in values.items() if value is not None}
    inner = getattr(spec, "of", None)
    return found if inner is None or isinstance(inner, str) else found | named_by(f"{key}.of", inner)


def file_of(name: str) -> Path | None:
    """The file that holds `module:Name` or `file.py:Name`, found without running anything; None where it is not."""
    source = name.partition(":")[0]
    if source.endswith(".py"):
        path = Path(source).resolve()
        return path if path.is_file() else None
    # To find a sub-module Python would import its package.
    top, *inner = source.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).resolve()
    for part in inner:
        folder = path.parent / part
        path = folder / "__init__.py" if folder.is_dir() else path.parent / f"{part}.py"
    return path if path.is_file() else None


def digest(name: str) -> str:
    """SHA-256 of the file that holds the code, 64 hex digits; empty where there is none."""
    path = file_of(name)
    return file_sha256(path) if path else ""


def allow(recipe: Any) -> None:
    """Let this process run the code that a recipe names, as its file is now."""
    _allowed.update((name, digest(name)) for name in named(recipe).values())


def allow_everything() -> None:
    """Let this process run whatever code a recipe, run or export names: --trust-code."""
    _everything[0] = True


def words(recipe: Any) -> list[str]:
    """What a command that repeats this one's work needs on its command line for the code that a recipe names."""
    return ["--trust-code"] if named(recipe) and _everything[0] else []


def is_allowed(name: str) -> bool:
    return _everything[0] or (name, digest(name)) in _allowed


def require(recipe: Any) -> None:
    """UserError for code that nobody has allowed, before any of it is imported."""
    for key, name in named(recipe).items():
        if not is_allowed(name):
            where = f", file {file_of(name)}, sha256 {digest(name)[:16]}" if file_of(name) else ""
            raise UserError(
                f"{key}: {name!r} is code that would be run{where}; read it, then add --trust-code "
                "(in Python: fewstep.networks.code.allow(recipe))"
            )


def _ledger() -> Path:
    return cache_dir("trust") / "made-here.json"


def _made_here() -> dict[str, dict[str, str]]:
    try:
        return read_json(_ledger())
    except UserError:
        return {}


def remember(folder: Path, recipe: Any) -> None:
    """Note in the user's cache that a run directory was made here with this code."""
    names = {name: digest(name) for name in named(recipe).values() if digest(name)}
    if names:
        held = {**_made_here(), str(folder.resolve()): names}
        with atomic_path(_ledger()) as aside:
            aside.write_text(json.dumps(held, indent=1))


def allow_made_here(folder: Path, recipe: Any) -> None:
    """Allow the code of a run directory that was made here with the very same code."""
    if not named(recipe):
        return
    held = _made_here().get(str(folder.resolve()))
    if isinstance(held, Mapping):
        same = [name for name in named(recipe).values() if digest(name) and held.get(name) == digest(name)]
        _allowed.update((name, digest(name)) for name in same)
