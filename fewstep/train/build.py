"""From a recipe to its roles."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewstep.data.base import Data
from fewstep.networks.specs import Site
from fewstep.random import fold
from fewstep.recipe import Recipe
from fewstep.roles import Roles

ORDER = ("teacher", "student", "critic", "discriminator")


def build_roles(recipe: Recipe, data: Data) -> Roles:
    """Every role of the recipe on the CPU in float32, weights seeded by (seed, role)."""
    modules: dict[str, nn.Module] = {}
    for name in ORDER:
        spec: Any = getattr(recipe, name)
        if spec is None:
            continue
        seed = fold(recipe.train.seed, "weights", name) % 2**63
        modules[name] = spec.build(Site(data.shape, data.classes, modules, seed))
    return Roles(**modules)


def build_product(recipe: Recipe, data: Data) -> nn.Module:
    """The student's module alone, with whatever it is built upon, ready to load weights."""
    return build_roles(recipe, data).student


def trained_roles(recipe: Recipe) -> list[str]:
    """Roles with weights of their own that a run changes, in building order."""
    return [n for n in ORDER if n != "teacher" and getattr(recipe, n) is not None]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
