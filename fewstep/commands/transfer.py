"""A base's adapter on its student: `fewstep eval --adapter FILE`, and how much of its effect comes along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.algebra.guidance import guided_teacher
from fewstep.commands.measure import teacher_product
from fewstep.commands.sources import Model, of_product
from fewstep.config import UserError
from fewstep.eval.protocol.evaluation import Evaluation
from fewstep.eval.protocol.preset import Preset
from fewstep.networks.adapters import Adapted
from fewstep.networks.lora_file import with_lora
from fewstep.networks.parts import Site
from fewstep.networks.rewards import HouseClassifierSpec, InkSpec
from fewstep.train.product import Product, open_product, teacher_beside

ATTRIBUTES = {"ink": InkSpec, "house-classifier": HouseClassifierSpec}
"""What of samples may be read, by the names of rewards that need no file."""


def marked(name: str, file: Path, scale: float) -> str:
    """A row's name with an adapter."""
    return f"{name} + {file.parent.name if file.stem.startswith('pytorch_lora') else file.stem} x{scale:g}"


def with_update(net: nn.Module, file: Path, scale: float) -> nn.Module:
    """A copy of the net with `scale` times the adapter of a LoRA file, or of a run whose student is an adapter."""
    if not (file / "recipe.yaml").is_file():
        return with_lora(net, file, scale).eval()
    adapter = open_product(file).net
    if not isinstance(adapter, Adapted):
        raise UserError(
            f"--adapter {file}: its student is no adapter; give a run whose student is a lora, or a LoRA file"
        )
    return with_lora(net, adapter, scale, said=str(file)).eval()


def with_adapter(product: Product, file: Path, scale: float) -> Product:
    """The product whose net has `scale` times an adapter; UserError where it does not fit."""
    return replace(product, net=with_update(product.net, file, scale), title=marked(product.title, file, scale))


def teachers(
    preset: Preset, product: Product, steps: Sequence[int], device: torch.device, file: Path | None, scale: float
) -> list[Model]:
    """The teacher of a run at these Heun steps, guided as its recipe says, and beside it with the adapter of a file."""
    recipe: Any = product.recipe
    data = recipe.data.open()
    bare = teacher_beside(recipe, data, product.title, product.checkpoint).to(device)
    guidance = recipe.shown_guidance()
    net = guided_teacher(bare, guidance, data.null)
    rows = [teacher_product(product, net, n) for n in steps]
    out = [of_product(preset, row, "teacher") for row in rows]
    if file is None:
        return out
    changed = guided_teacher(with_update(bare, file, scale), guidance, data.null)
    names = [marked(m.name, file, scale) for m in out]
    return out + [
        of_product(preset, replace(row, net=changed), "teacher", name) for row, name in zip(rows, names, strict=True)
    ]


def attribute_of(product: Product, name: str) -> tuple[str, nn.Module]:
    """What is read of every sample by `--attribute NAME`. UserError for another name, and for samples it is not of."""
    if name not in ATTRIBUTES:
        raise UserError(f"--attribute {name!r}: is not one of {', '.join(ATTRIBUTES)}")
    side = product.picture_shape()[-1]
    spec: Any = ATTRIBUTES[name]
    made = spec(of="fashion-mnist") if name == "house-classifier" and side == 28 else spec()
    return name, made.build(Site(product.picture_shape(), product.classes, {}, 0, product.image))


def add_ratios(found: Sequence[Evaluation], file: Path, scale: float, attribute: str) -> None:
    """Put `transfer ratio` on the students' rows with the adapter: their gain of the attribute over the teacher's.

    The teacher's is that of its row of most steps. One is left out where the teacher's own gain is within two standard
    errors of 0: it would be a quotient of two chances. Errors are of independent rows; from one noise they are smaller.
    """
    key = f"reward ({attribute})"
    rows = {e.name: e for e in found}
    gains = {
        name: _gain(e, rows[marked(name, file, scale)], key)
        for name, e in rows.items()
        if marked(name, file, scale) in rows and key in e.metrics
    }
    teachers = [(rows[name].steps or 0, gain) for name, gain in gains.items() if rows[name].group == "teacher"]
    if not teachers:
        return
    base, error = max(teachers)[1]
    for name, (gain, own) in gains.items():
        row = rows[marked(name, file, scale)]
        row.metrics[f"gain of {attribute}"] = {"value": gain, "standard_error": own}
        if rows[name].group != "teacher" and abs(base) > 2 * error:
            ratio = gain / base
            entry = {"value": ratio, "standard_error": math.hypot(own, ratio * error) / abs(base)}
            row.metrics[f"transfer ratio ({attribute})"] = entry


def _gain(plain: Evaluation, adapted: Evaluation, key: str) -> tuple[float, float]:
    a, b = plain.metrics[key], adapted.metrics[key]
    return b["value"] - a["value"], math.hypot(a["standard_error"], b["standard_error"])
