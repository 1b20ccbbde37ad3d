"""Recipes as files: where they are found, what they extend and what a command line changes. Nothing is checked here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from fewstep.config import FAST_LOADER, RecipeError, Source, UserError, _close, apply, load_yaml, merge, override
from fewstep.files import expanded

EXTENDS = "extends"
"""A shipped recipe, or a file beside this one, whose keys hold where this file names none; one level."""


@cache
def shipped() -> Mapping[str, Path]:
    """Recipes that ship with fewstep, by name such as `toy/dmd2`."""
    root = Path(str(files("fewstep.recipes")))
    found = sorted(root.rglob("*.yaml"))
    return MappingProxyType({p.relative_to(root).with_suffix("").as_posix(): p for p in found})


def find(name: str) -> Path:
    """The file of a recipe: a shipped name, or a path to a YAML file. Raises RecipeError with a suggestion."""
    names = shipped()
    if name in names:
        return names[name]
    if not name or "\0" in name or len(name) > 1000:
        raise RecipeError(f"recipe {name[:40]!r}: is no name and no path; see `fewstep recipes ls`")
    try:
        path = expanded(name)
    except UserError as error:
        raise RecipeError(f"recipe {error}") from None
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    if (path / "recipe.yaml").is_file():
        raise RecipeError(f"{name}: is a run directory; its recipe is {path / 'recipe.yaml'}")
    if path.suffix in (".yaml", ".yml") or path.exists():
        raise RecipeError(f"{name}: no such recipe file")
    hint = _close(name, names) or "; see `fewstep recipes ls`"
    raise RecipeError(f"recipe {name!r} is not shipped{hint}")


def outlines() -> list[dict[str, Any]]:
    """name, methods, about and results of every shipped recipe, as its file says; nothing is checked."""
    texts = {name: yaml.load(path.read_text(encoding="utf-8"), FAST_LOADER) for name, path in shipped().items()}
    out = []
    for name, own in texts.items():
        base = texts.get(f"{name.rpartition('/')[0]}/{own.get('extends')}", texts.get(own.get("extends"), {}))
        method, inherited = own.get("method", {}), base.get("method", {})
        if method.get("name", inherited.get("name")) == inherited.get("name"):  # another method keeps nothing of it
            method = {**inherited, **method}
        inner = [share["method"]["name"] for share in method.get("methods", ())]
        about = own.get("about", base.get("about", ""))
        methods = [method.get("name", ""), *inner]
        out.append({"name": name, "methods": methods, "about": about, "results": own.get("results", [])})
    return out


def read(name: str, settings: Sequence[str] = (), *values: Mapping[str, Any]) -> Source:
    """A recipe's merged source: its `extends` base (one level), the file, key=value settings, then Python values."""
    path = find(name)
    source = load_yaml(path, path.name if name in shipped() else str(path))
    where = source.where((EXTENDS,))
    base_name = source.data.pop(EXTENDS, None)
    if base_name is not None:
        source = merge(_base(path, base_name, where), source)
    source = override(source, settings)
    for given in values:
        source = apply(source, given)
    return source


def _base(path: Path, name: object, where: str) -> Source:
    """The recipe that `extends: name` in the file `path` means; RecipeError begins with `where` it is said."""
    if not isinstance(name, str) or not name:
        raise RecipeError(f"{where}: extends: expected the name or file of a recipe, got {name!r}")
    beside = path.parent / name
    try:
        found = beside if beside.suffix in (".yaml", ".yml") and beside.is_file() else find(name)
    except (RecipeError, OSError, ValueError) as error:
        raise RecipeError(f"{where}: extends: {error}") from None
    base = load_yaml(found, found.name if name in shipped() else str(found))
    if EXTENDS in base.data:
        raise RecipeError(f"{where}: extends: {found.name} extends another recipe; only one level is allowed")
    for own in ("results", "expected"):
        base.data.pop(own, None)
    return base
