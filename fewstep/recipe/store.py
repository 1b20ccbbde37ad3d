"""Recipes as checked objects: loaded from files or a run, and written again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from fewstep.config import UserError, load_yaml, plain, validate
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import read


def load(name: str, settings: Sequence[str] = (), values: Mapping[str, Any] = MappingProxyType({})) -> Recipe:
    """Find, merge and check a recipe; RecipeError lists every problem with file, line and key.

    settings: key=value, as on the command line. values: Python values by such keys, see `fewstep.config.apply`.
    """
    return validate(Recipe, read(name, settings, values))


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
