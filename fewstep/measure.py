"""What the command line measures: products by Frechet or energy distance, with time and network calls."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.config import UserError
from fewstep.eval import (
    FrechetResult,
    Reference,
    class_accuracy,
    digits_reference,
    energy_distance,
    fashion_reference,
    frechet_distance,
    house_digits,
    house_fashion,
    within_class_diversity,
)
from fewstep.pictures import to_pixels
from fewstep.product import Product
from fewstep.recipe import Evaluate
from fewstep.sampling import many_step


@dataclass(frozen=True)
class Measured:
    """One row of the table. `error` is one standard error of `value`, None where it is not known."""

    title: str
    metric: str
    value: float
    error: float | None
    samples: int
    calls: int
    seconds_per_1000: float
    accuracy: float | None = None
    diversity: float | None = None
    frechet: FrechetResult | None = field(default=None, repr=False, compare=False)
    """The full distance, with the influence of each sample, for paired differences."""

    def row(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "frechet"}


def judge(metric: str, shape: tuple[int, ...], classes: int) -> tuple[Any, Reference]:
    """The house classifier of a metric and what it compares with; UserError when it is not for such samples."""
    made = {
        "fd-house-digits": (house_digits, digits_reference),
        "fd-house-fashion-mnist": (house_fashion, fashion_reference),
    }
    extractor = made[metric][0]()
    size = extractor.input_size
    if tuple(shape[-2:]) != (size, size) or len(shape) != 3 or shape[0] not in (1, 3):
        raise UserError(f"metric {metric} is for {size} x {size} images; these samples are {list(shape)}")
    if classes not in (0, extractor.classes):
        raise UserError(
            f"metric {metric} knows {extractor.classes} classes; these samples are of {classes} other ones"
        )
    try:
        return extractor, made[metric][1](extractor)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"metric {metric}: {error}") from None


def check_metric(product: Product, spec: Evaluate) -> tuple[Any, Reference] | None:
    """What `measure` compares with, None for the energy distance, before a sample is drawn.

    Raises UserError when the metric is not for this product's samples or a file that it needs is missing.
    """
    shape = product.picture_shape()
    if spec.metric != "energy":
        return judge(spec.metric, shape, product.classes)
    if len(shape) != 1:
        raise UserError(f"metric energy is for vectors; these samples are {list(shape)}")
    return None


def teacher_product(product: Product, teacher: Any, steps: int) -> Product:
    """The teacher of a run under a Heun sampler, with the run's shape and classes."""
    title = f"teacher, {steps} step{'s' * (steps > 1)}"
    return replace(product, net=teacher, sampler=many_step(steps), title=title, trained=None)


def measure(product: Product, spec: Evaluate, *, batch: int = 256) -> tuple[Measured, Tensor]:
    """Draw spec.samples samples of spec.seed on and measure them; returns the row and the samples."""
    judged = check_metric(product, spec)
    started = time.perf_counter()
    x = product.draw(spec.samples, spec.seed, batch=batch)
    seconds = (time.perf_counter() - started) * 1000 / spec.samples
    calls = product.sampler.network_calls()
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x.flatten(1)).all(1)).sum())
        raise UserError(
            f"{product.title}: {bad} of {spec.samples} samples are not finite; nothing was measured"
        )
    if judged is None:
        assert product.recipe is not None
        real, _ = product.recipe.data.open().all()  # type: ignore[attr-defined]
        value = energy_distance(x.double(), real[: max(spec.samples, 4000)].double())
        return Measured(product.title, "energy x1000", 1000 * value, None, spec.samples, calls, seconds), x
    extractor, reference = judged
    features = torch.cat([extractor(p) for p in to_pixels(x).split(512)])
    result = frechet_distance(features, reference.statistics)
    accuracy = diversity = None
    labels = product.labels(spec.samples) if product.classes else None
    if labels is not None:
        logits = extractor.from_features(features)
        accuracy = class_accuracy(logits, labels).value
        assert reference.features is not None
        assert reference.labels is not None
        ratios = within_class_diversity(features, labels, reference.features, reference.labels)
        diversity = sum(ratios.values()) / len(ratios)
    row = Measured(
        product.title,
        f"FD {extractor.name}",
        result.value,
        result.standard_error,
        spec.samples,
        calls,
        seconds,
        accuracy,
        diversity,
        result,
    )
    return row, x
