"""Recipe files as a user gets them: a first line for editors, and the schema that it names beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fewstep.config import UserError
from fewstep.files import atomic_path
from fewstep.recipe.source import find

SCHEMA = "recipe.schema.json"
"""Beside the recipe, so that the line holds wherever the folder is moved and every editor finds it."""
LINE = f"# yaml-language-server: $schema={SCHEMA}\n"


def copy_recipe(name: str, to: Path, force: bool = False) -> None:
    """Write a recipe to a file, and the schema beside it. UserError for what must not or cannot be written."""
    write_recipes({to: find(name).read_text(encoding="utf-8")}, force)


def write_recipes(texts: Mapping[Path, str], force: bool = False) -> None:
    """Write recipes by file, with the line for editors; a schema that is there already is left alone."""
    for to in texts:
        if to.suffix not in (".yaml", ".yml"):
            raise UserError(f"{to}: a recipe's name ends in .yaml")
    write({to: text if text.startswith(LINE) else LINE + text for to, text in texts.items()}, force)
    from fewstep.recipe.json_schema import text as schema

    for folder in {to.parent for to in texts}:
        if not (folder / SCHEMA).exists():
            write({folder / SCHEMA: schema()})


def write(texts: Mapping[Path, str], force: bool = False) -> None:
    """Write files, or none of them. UserError for one that exists, unless `force`, and for a missing folder."""
    for to in texts:
        if to.is_dir():
            raise UserError(f"{to}: is a folder; name a file")
        if to.exists() and not force:
            raise UserError(f"{to}: exists; overwrite it with --force")
        if not to.parent.is_dir():
            raise UserError(f"{to.parent}: no such folder")
    for to, text in texts.items():
        with atomic_path(to) as part:
            part.write_text(text, encoding="utf-8")
