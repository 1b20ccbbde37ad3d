"""`fewstep recipes check`: a recipe's keys, its roles, its noise levels and whether its student will export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewstep.commands.check_roles import Roles, look
from fewstep.config import Absent, Source, UserError, validate
from fewstep.export.forecast import foretold, refused
from fewstep.export.levels import agree, levels_of, trained_levels
from fewstep.recipe.pinned import fetched, pinned
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import read
from fewstep.train.product import product_of


def check(name: str, settings: Sequence[str], download: bool = False) -> tuple[list[str], list[str]]:
    """`fewstep recipes check`: (its lines, what could not be checked); RecipeError or UserError for what cannot train.

    download: fetch the repositories of the hub that it names, as far as they are not in the hub's cache.
    """
    source = read(name, settings)
    recipe = validate(Recipe, source)
    if download:
        fetched(recipe)
    _refuse_absent(recipe)
    roles = look(recipe, source)
    lines = [f"{stage.method.name}, {stage.steps} steps" for stage in recipe.stages()]
    lines += check_recipe(recipe, source, roles).splitlines()
    missing = list(dict.fromkeys(roles.absent.values()))
    return [f"{name}: {line}" for line in lines], [f"{name}: not checked: {line}" for line in missing]


def check_recipe(recipe: Recipe, source: Source | None = None, roles: Roles | None = None) -> str:
    """Lines about a recipe's levels and its export, before anything is trained.

    UserError when training and evaluation cannot agree, RecipeError when a method cannot train a student of the
    process that the teacher's files give it; with `source` it begins with the file and line.
    """
    _refuse_absent(recipe)
    roles = roles or look(recipe, source)
    if "student" not in roles.modules:
        return "schedule and export: not known without the student"
    sampler = recipe.sampler()
    product = product_of(recipe, roles.modules["student"], _Data(roles), "student")
    process: Any = product.net.process
    recipe.check_process(process, source)
    way, export = None, ""
    try:
        way = foretold(product)
    except UserError as error:
        export = f"\nexport: {refused(error)}"
    if sampler.kind == "ode":
        return f"schedule: an ODE sampler of {len(sampler.steps)} steps, any number is allowed{export}"
    evaluation = levels_of(process, sampler.steps)
    agree(trained_levels(recipe.method, process), evaluation)
    parts = ["training", "evaluation"] if way is None or not way.scheduler else ["training, evaluation", way.scheduler]
    return f"schedule: {' and '.join(parts)} agree (sigma / alpha {evaluation.shown()}){export}"


class _Data:
    text = None

    def __init__(self, roles: Roles) -> None:
        self.shape, self.classes = roles.shape, roles.classes or 0


def _refuse_absent(recipe: Recipe) -> None:
    """UserError for a teacher, an encoder or a VAE by a hub's name that is not in the hub's cache."""
    try:
        pinned(recipe)
    except Absent as error:
        raise UserError(str(error)) from None
