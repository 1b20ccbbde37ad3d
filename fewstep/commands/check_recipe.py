"""`fewstep recipes check`: a recipe's keys, its noise levels and whether its student will export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fewstep.config import Source, UserError, validate
from fewstep.export.forecast import about
from fewstep.export.levels import agree, levels_of, trained_levels
from fewstep.networks.folder import hub_hint
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import read


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
    _refuse_hub_ids(recipe)
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
    parts = ["training", "evaluation"] if way is None or not way.scheduler else ["training, evaluation", way.scheduler]
    return f"schedule: {' and '.join(parts)} agree (sigma / alpha {evaluation.shown()}){export}"


def _refuse_hub_ids(recipe: Recipe) -> None:
    """UserError for a teacher, an encoder or a VAE that is named as a hub names it: no folder will come of it."""
    data: Any = recipe.data
    parts = {"teacher": recipe.teacher, "data.encoder": getattr(data, "encoder", None)}
    paths = {f"{key}.path": getattr(part, "path", None) for key, part in parts.items()}
    for key, path in (paths | {"data.vae": getattr(data, "vae", None)}).items():
        if path is not None and hub_hint(str(path)):
            raise UserError(f"{key} {path}: no such folder{hub_hint(str(path))}")
