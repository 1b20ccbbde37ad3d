"""Tables of what ships with fewstep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fewstep.config import Source, validate
from fewstep.export.levels import agree, levels_of, trained_levels
from fewstep.recipe.schema import Recipe
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


def check(name: str, settings: Sequence[str]) -> Iterator[str]:
    """The lines of `fewstep recipes check`; RecipeError or UserError for what cannot be trained."""
    source = read(name, settings)
    recipe = validate(Recipe, source)
    for stage in recipe.stages():
        yield f"{name}: {stage.method.name}, {stage.steps} steps"
    for line in check_recipe(recipe, source).splitlines():
        yield f"{name}: {line}"


def check_recipe(recipe: Recipe, source: Source | None = None) -> str:
    """Lines about a recipe's levels and its export, before anything is trained.

    UserError when training and evaluation cannot agree, RecipeError when a method cannot train a student of the
    process that the teacher's files give it; with `source` it begins with the file and line.
    """
    from fewstep.export.forecast import about

    sampler = recipe.sampler()
    product, way, told = about(recipe)
    if product is None:
        return f"schedule and export: {told}"
    process: Any = product.net.process
    recipe.check_process(process, source)
    export = f"\nexport: {told}" if told else ""
    if sampler.kind == "ode":
        return f"schedule: an ODE sampler of {len(sampler.steps)} steps, any number is allowed{export}"
    evaluation = levels_of(process, sampler.steps)
    agree(trained_levels(recipe.method, process), evaluation)
    parts = (
        ["training", "evaluation"]
        if way is None or not way.scheduler
        else ["training, evaluation", way.scheduler]
    )
    return f"schedule: {' and '.join(parts)} agree (sigma / alpha {evaluation.shown()}){export}"
