"""The recipe: the one dataclass in which all parts of a run meet, and where recipes are found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import yaml

import fewstep.data
import fewstep.methods
import fewstep.networks.perceptual
import fewstep.networks.routed
import fewstep.networks.specs  # noqa: F401  registers networks and teachers
from fewstep.config import (
    RecipeError,
    Source,
    UserError,
    _close,
    load_yaml,
    merge,
    override,
    plain,
    validate,
)
from fewstep.recipe.schema import Recipe


def shipped() -> dict[str, Path]:
    """Recipes that ship with fewstep, by name such as `toy/dmd2`."""
    root = Path(str(files("fewstep.recipes")))
    found = sorted(root.rglob("*.yaml"))
    return {str(p.relative_to(root).with_suffix("")).replace("\\", "/"): p for p in found}


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
        base_path = (
            beside if beside.suffix in (".yaml", ".yml") and beside.is_file() else find(str(base_name))
        )
        base = load_yaml(base_path, base_path.name if str(base_name) in shipped() else str(base_path))
        if "extends" in base.data:
            raise RecipeError(f"{base_path.name}: extends another recipe; only one level is allowed")
        base.data.pop("results", None)
        source = merge(base, source)
    return override(source, settings)


def load(name: str, settings: Sequence[str] = ()) -> Recipe:
    """Find, merge and check a recipe; RecipeError lists every problem with file, line and key."""
    return validate(Recipe, read(name, settings))


def load_run(run: Path) -> Recipe:
    """The resolved recipe of a run directory."""
    path = run / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{run}: is not a run directory (recipe.yaml is missing)")
    return validate(Recipe, load_yaml(path))


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML text that `load_run` reads back equal."""
    data = json.loads(json.dumps(plain(recipe)))
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
