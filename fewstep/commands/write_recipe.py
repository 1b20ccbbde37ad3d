"""Recipe files as a user gets them: a first line for editors, and the schema that it names beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fewstep.config import UserError
from fewstep.files import atomic_path
from fewstep.recipe.source import find, shipped

SCHEMA = "recipe.schema.json"
"""Beside the recipe, so that the line holds wherever the folder is moved and every editor finds it."""
LINE = f"# yaml-language-server: $schema={SCHEMA}\n"


def copy_recipe(name: str, to: Path, force: bool = False) -> None:
    """Write a recipe to a file, and the schema beside it. UserError for what must not or cannot be written."""
    text = find(name).read_text(encoding="utf-8")
    own = name in shipped() and not name.startswith(("paper/", "models/"))
    write_recipes({to: own_copy(text, sources=not own)}, force)


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


def own_copy(text: str, sources: bool) -> str:
    """A recipe's text without its `results` and `expected` bands, which are not the copy's.

    Comments go too, for they tell what was found on the recipe's own data; with `sources` they name where published
    settings are from, and stay.
    """
    text = without(text, "results", "expected")
    if sources:
        return text
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    whole = yaml.safe_load("\n".join(lines))
    for i, line in enumerate(lines):
        for mark in re.finditer(r"\s+#", line):
            others = [*lines[:i], line[: mark.start()], *lines[i + 1 :]]
            if _means(others, whole):  # not so for a # within quotes
                lines = others
                break
    return "\n".join(lines) + "\n"


def without(text: str, *keys: str) -> str:
    """A recipe's text without some of its top keys."""
    return re.sub(rf"(?m)^(?:{'|'.join(keys)}):.*\n?(?:[ \t#-].*\n?|\n)*", "", text)


def _means(lines: Sequence[str], what: Any) -> bool:
    try:
        return bool(yaml.safe_load("\n".join(lines)) == what)
    except yaml.YAMLError:
        return False
