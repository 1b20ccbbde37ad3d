"""`fewstep recipes ls`: what ships, in a table, from the YAML files alone."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fewstep.recipe.source import read, shipped


def list_recipes() -> None:
    """Name, method, what it is about and the measured or published result of each shipped recipe."""
    out = Table(box=None, pad_edge=False)
    for column in ("recipe", "method", "about", "result"):
        out.add_column(column, no_wrap=column == "recipe")
    for name in shipped():
        data = read(name).data
        results = [f"{r['metric']} {r['value']} ({r['source']})" for r in data.get("results", [])]
        out.add_row(name, data.get("method", {}).get("name", ""), data.get("about", ""), "; ".join(results))
    Console().print(out)
