"""Recipes as files: where they are found, what they extend and what a command line changes. Nothing is checked here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from fewstep.config import RecipeError, Source, _close, load_yaml, merge, override


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
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or path.exists():
        raise RecipeError(f"{name}: no such recipe file")
    hint = _close(name, names) or "; see `fewstep recipes ls`"
    raise RecipeError(f"recipe {name!r} is not shipped{hint}")


def read(name: str, settings: Sequence[str] = ()) -> Source:
    """A recipe's merged source: its `extends` base (one level), the file, then key=value settings."""
    path = find(name)
    source = load_yaml(path, path.name if name in shipped() else str(path))
    base_name = source.data.pop("extends", None)
    if base_name is not None:
        beside = path.parent / str(base_name)
        base_path = beside if beside.suffix in (".yaml", ".yml") and beside.is_file() else find(str(base_name))
        base = load_yaml(base_path, base_path.name if str(base_name) in shipped() else str(base_path))
        if "extends" in base.data:
            raise RecipeError(f"{base_path.name}: extends another recipe; only one level is allowed")
        base.data.pop("results", None)
        source = merge(base, source)
    return override(source, settings)
