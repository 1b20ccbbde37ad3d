"""From a recipe to its roles."""

from __future__ import annotations

import torch
from torch import nn

from fewstep.algebra.draws import Draws, fold
from fewstep.config import RecipeError
from fewstep.data.base import Data, conditions_of, image_shape, renumbered
from fewstep.networks import code
from fewstep.networks.adapters import Adapted, own_parameters
from fewstep.networks.parts import Site
from fewstep.networks.rewards import check_reward
from fewstep.networks.roles import Roles
from fewstep.recipe.faults import check_views
from fewstep.recipe.schema import Recipe


def build_roles(recipe: Recipe, data: Data, teacher: nn.Module | None = None) -> Roles:
    """Every role of the recipe on the CPU, weights seeded by (seed, role); what is trained is in float32.

    teacher: in place of the one that the recipe's would load.

    A bf16 weight of .1 does not change by less than 2e-4: at usual rates most updates would be rounded away.
    UserError for code that the recipe names and nobody has allowed to run.
    """
    code.require(recipe)
    recipe.check_conditions(conditions_of(data))
    check_views(recipe, tuple(data.shape))
    modules: dict[str, nn.Module] = {} if teacher is None else {"teacher": teacher}
    for name in recipe.role_names():
        if name in modules:
            continue
        seed = fold(recipe.train.seed, "weights", name) % 2**63
        site = Site(data.shape, data.classes, modules, seed, image_shape(data), renumbered(data))
        modules[name] = recipe.spec(name).build(site)
    processes = {name: m.process for name, m in modules.items() if hasattr(m, "process")}
    for name, process in processes.items():
        # Methods noise once and show the result to every role, at times of the student's process.
        if process != processes["student"]:
            raise RecipeError(
                f"{name}.process: {process} differs from the student's, {processes['student']}; use the same"
            )
    recipe.check_process(processes["student"])  # type: ignore[arg-type]
    asked = {stage.method.needs().reward for stage in recipe.stages()} - {""}
    if asked:
        try_reward(modules["reward"], data, gradient="gradient" in asked)
    for name in set().union(trained_roles(recipe), *(s.method.needs().trained for s in recipe.stages())):
        if name in modules:
            _make_fp32(modules[name])
    return Roles(**modules)


TRIED = 3
"""Samples of noise that a reward is tried on; not 1, for which a mean over the batch would have the right shape."""


def try_reward(reward: nn.Module, data: Data, *, gradient: bool) -> None:
    """`check_reward` on noise of the data's shape and the data's conditions."""
    draws = Draws(fold("reward"), torch.arange(TRIED))
    check_reward(reward, draws.normal(*data.shape), data.conditions(draws), gradient=gradient)


def _make_fp32(module: nn.Module) -> None:
    buffers = () if isinstance(module, Adapted) else module.buffers()
    for t in (*own_parameters(module), *buffers):
        if t.dtype in (torch.bfloat16, torch.float16):
            t.data = t.data.float()


def build_product(recipe: Recipe, data: Data) -> nn.Module:
    """The student's module alone, with whatever it is built upon, ready to load weights."""
    return build_roles(recipe, data).student


def trained_roles(recipe: Recipe) -> list[str]:
    """Roles with weights of their own that a run changes, in building order."""
    return [n for n in recipe.role_names() if n != "teacher" or recipe.overwrites_teacher()]
