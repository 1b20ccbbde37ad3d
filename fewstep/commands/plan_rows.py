"""Bytes of one role's weights and what training keeps beside them; also of the roles that need no code of a recipe's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fewstep.algebra.draws import fold
from fewstep.data.base import image_shape, renumbered
from fewstep.export.forecast import bare_model
from fewstep.networks import code
from fewstep.networks.adapters import Adapted, own_parameters
from fewstep.networks.folder import read_folder
from fewstep.networks.parts import Site
from fewstep.networks.routed import source_of
from fewstep.recipe.schema import AdamW, Recipe
from fewstep.train.live import bytes_of

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass
class RoleMemory:
    """Bytes of one role: its own weights and buffers, their gradients, Adam's moments, averages."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    ema: int = 0


def buffers_of(module: nn.Module) -> int:
    """Bytes of a role's buffers; an adapter has none of its own."""
    return 0 if isinstance(module, Adapted) else bytes_of(module.buffers())


def moments(parameters: Sequence[nn.Parameter], spec: AdamW) -> int:
    """Bytes of an optimiser's state for parameters."""
    if spec.rule == "came":
        # The first moment, and two pairs of a row and a column for the last two axes.
        factored = sum(8 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2]) for p in parameters if p.ndim > 1)
        return bytes_of(parameters) + factored + sum(4 * p.numel() for p in parameters if p.ndim < 2)
    if spec.bits == 32:
        return 2 * bytes_of(parameters)
    # bitsandbytes keeps tensors below 4096 elements in 32 bits, others in bytes with a scale per 256.
    return sum(8 * p.numel() if p.numel() < 4096 else int(2 * p.numel() * (1 + 4 / 256)) for p in parameters)


def without_code(recipe: Recipe) -> tuple[dict[str, RoleMemory], list[str]]:
    """(rows of the roles that can be built without the code that a recipe names, what is left out).

    A teacher's network is known from its folder's config, copies of it too, without what a wrapper adds.
    """
    data = recipe.data.open()
    built: dict[str, nn.Module] = {}
    shapes: dict[str, tuple[Sequence[Tensor], int]] = {}
    rows: dict[str, RoleMemory] = {}
    trained = set().union(*(s.method.needs().trained for s in recipe.stages()))
    for name in recipe.role_names():
        spec: Any = recipe.spec(name)
        if name != "teacher" and code.named_by(name, spec):
            continue
        if name == "teacher":
            if spec.name == "diffusers":
                model = bare_model(read_folder(spec.folder))
                shapes[name] = list(model.parameters()), buffers_of(model)
                size = bytes_of(shapes[name][0]) + shapes[name][1]
                rows[name] = RoleMemory(weights=size * _BYTES[spec.dtype] // 4)
            continue
        if getattr(spec, "name", None) == "copy" and spec.of in shapes:
            shapes[name] = shapes[spec.of]
        elif source_of(spec) is None or source_of(spec) in built:
            seed = fold(recipe.train.seed, "weights", name) % 2**63
            site = Site(data.shape, data.classes, built, seed, image_shape(data), renumbered(data))
            built[name] = spec.build(site)
            shapes[name] = own_parameters(built[name]), buffers_of(built[name])
        else:
            continue
        parameters, beside = shapes[name]
        size = bytes_of(parameters)
        rows[name] = row = RoleMemory(weights=size + beside)
        if name in trained:
            row.gradients, row.optimizer = size, moments(parameters, recipe.optimizer(name))
        if name == "student":
            row.ema = len(recipe.train.ema) * size
    return rows, [*(name for name in recipe.role_names() if name not in rows), "activations"]
