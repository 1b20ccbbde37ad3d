"""From a recipe to its roles."""

from __future__ import annotations

from torch import nn

from fewstep.config import RecipeError
from fewstep.data.base import Data
from fewstep.networks.specs import Site
from fewstep.random import fold
from fewstep.recipe import Recipe
from fewstep.roles import Roles


def build_roles(recipe: Recipe, data: Data) -> Roles:
    """Every role of the recipe on the CPU in float32, weights seeded by (seed, role)."""
    modules: dict[str, nn.Module] = {}
    for name in recipe.role_names():
        seed = fold(recipe.train.seed, "weights", name) % 2**63
        modules[name] = recipe.spec(name).build(Site(data.shape, data.classes, modules, seed))
    processes = {name: m.process for name, m in modules.items() if hasattr(m, "process")}
    for name, process in processes.items():
        # Methods noise once and show the result to every role, at times of the student's process.
        if process != processes["student"]:
            raise RecipeError(
                f"{name}.process: {process} differs from the student's, {processes['student']}; use the same"
            )
    return Roles(**modules)


def build_product(recipe: Recipe, data: Data) -> nn.Module:
    """The student's module alone, with whatever it is built upon, ready to load weights."""
    return build_roles(recipe, data).student


def trained_roles(recipe: Recipe) -> list[str]:
    """Roles with weights of their own that a run changes, in building order."""
    return [n for n in recipe.role_names() if n != "teacher" or recipe.overwrites_teacher()]
