"""Tables of what ships with fewstep."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from fewstep.export.levels import agree, levels_of, trained_levels
from fewstep.recipe.store import read, shipped


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


def check_recipe(recipe: Any) -> str:
    """Lines about a recipe's levels and its export, before anything is trained.

    UserError when training and evaluation cannot agree.
    """
    from fewstep.export.forecast import about

    sampler = recipe.sampler()
    product, way, told = about(recipe)
    if product is None:
        return f"schedule and export: {told}"
    export = f"\nexport: {told}" if told else ""
    if sampler.kind == "ode":
        return f"schedule: an ODE sampler of {len(sampler.steps)} steps, any number is allowed{export}"
    process: Any = product.net.process
    evaluation = levels_of(process, sampler.steps)
    agree(trained_levels(recipe.method, process), evaluation)
    parts = (
        ["training", "evaluation"]
        if way is None or not way.scheduler
        else ["training, evaluation", way.scheduler]
    )
    return f"schedule: {' and '.join(parts)} agree (sigma / alpha {evaluation.shown()}){export}"
