"""`fewstep recipes ls`: what ships, from the YAML files alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from fewstep.commands.listing import as_json, chosen, show
from fewstep.config import UserError
from fewstep.recipe.source import outlines, shipped

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
