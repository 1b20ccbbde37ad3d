"""`fewstep recipes ls` and `cp`: what ships, from the YAML files alone, and a copy without what was measured of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from fewstep.commands.listing import as_json, chosen, show
from fewstep.config import UserError
from fewstep.recipe.source import find, outlines, shipped

COLUMNS = {"name": "recipe", "method": "method", "about": "about", "result": "result"}


def list_recipes(
    words: Sequence[str] = (), method: str | None = None, json: bool = False, console: Console | None = None
) -> None:
    """Name, method, what it is about and the result of each shipped recipe that has all words and the method."""
    console = console or Console()
    rows = [_row(outline) for outline in outlines()]
    if method is not None:
        known = {m for r in rows for m in r["methods"]}
        own = method if method in known else _of_card(method)
        rows = [r for r in rows if own in r["methods"]]
    found = chosen(rows, words)
    if not found:
        asked = " ".join([*words, *(["--method", method] if method else [])])
        raise UserError(f"no shipped recipe has {asked!r}; `fewstep recipes ls` lists all {len(shipped())}")
    if json:
        keys = ("name", "methods", "about", "results")
        console.print(as_json([{k: r[k] for k in keys} for r in found]), soft_wrap=True, highlight=False, markup=False)
    else:
        show(console, found, COLUMNS, extra=("method", "result"))


def _of_card(name: str) -> str:
    """The method that a paper's name stands for; RecipeError suggests a name."""
    from fewstep.recipe.cards import card

    return card(name).name


def _row(outline: dict[str, Any]) -> dict[str, Any]:
    results = [f"{r['metric']} {r['value']} ({r['source']})" for r in outline["results"]]
    return {**outline, "method": " + ".join(outline["methods"]), "result": "; ".join(results)}


def copy_recipe(name: str, to: Path, force: bool = False) -> None:
    """`fewstep recipes cp`: a shipped recipe as a file of one's own. UserError where it cannot be written."""
    if to.exists() and not force:
        raise UserError(f"{to}: exists; overwrite it with --force")
    if to.suffix not in (".yaml", ".yml"):
        raise UserError(f"{to}: a recipe's name ends in .yaml")
    if not to.parent.is_dir():
        raise UserError(f"{to.parent}: no such folder")
    text = find(name).read_text(encoding="utf-8")
    to.write_text(own_copy(text, sources=name.startswith(("paper/", "models/"))), encoding="utf-8")


def own_copy(text: str, sources: bool) -> str:
    """A recipe's text without its `results`, which are not the copy's.

    Comments go too, for they tell what was found on the recipe's own data; with `sources` they name where published
    settings are from, and stay.
    """
    text = re.sub(r"(?m)^results:.*\n?(?:[ \t#-].*\n?|\n)*", "", text)
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


def _means(lines: Sequence[str], what: Any) -> bool:
    try:
        return bool(yaml.safe_load("\n".join(lines)) == what)
    except yaml.YAMLError:
        return False
