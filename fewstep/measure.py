"""What the command line measures: products by Frechet or energy distance, with time and network calls."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.config import UserError
from fewstep.eval import (
    class_accuracy,
    digits_reference,
    energy_distance,
    frechet_distance,
    house_digits,
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

    def row(self) -> dict[str, Any]:
        return asdict(self)


def teacher_product(product: Product, teacher: Any, steps: int) -> Product:
    """The teacher of a run under a Heun sampler, with the run's shape and classes."""
    title = f"teacher, {steps} step{'s' * (steps > 1)}"
    return replace(product, net=teacher, sampler=many_step(steps), title=title, trained=None)


def measure(product: Product, spec: Evaluate, *, batch: int = 256) -> tuple[Measured, Tensor]:
    """Draw spec.samples samples of spec.seed on and measure them; returns the row and the samples."""
    started = time.perf_counter()
    x = product.draw(spec.samples, spec.seed, batch=batch)
    seconds = (time.perf_counter() - started) * 1000 / spec.samples
    calls = product.sampler.network_calls()
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x.flatten(1)).all(1)).sum())
        raise UserError(
            f"{product.title}: {bad} of {spec.samples} samples are not finite; nothing was measured"
        )
    if spec.metric == "energy":
        assert product.recipe is not None
        real, _ = product.recipe.data.open().all()  # type: ignore[attr-defined]
        value = energy_distance(x.double(), real[: max(spec.samples, 4000)].double())
        return Measured(product.title, "energy x1000", 1000 * value, None, spec.samples, calls, seconds), x
    if product.shape[-2:] != (8, 8):
        raise UserError(f"metric {spec.metric} is for 8 x 8 digits; these samples are {list(product.shape)}")
    extractor = house_digits()
    pixels = to_pixels(x)
    features = torch.cat([extractor(p) for p in pixels.split(512)])
    reference = digits_reference(extractor)
    result = frechet_distance(features, reference.statistics)
    accuracy = diversity = None
    labels = product.labels(spec.samples)
    if labels is not None:
        logits = torch.cat([extractor.logits(p) for p in pixels.split(512)])
        accuracy = class_accuracy(logits, labels).value
        assert reference.features is not None
        assert reference.labels is not None
        ratios = within_class_diversity(features, labels, reference.features, reference.labels)
        diversity = sum(ratios.values()) / len(ratios)
    row = Measured(
        product.title,
        "FD house-digits",
        result.value,
        result.standard_error,
        spec.samples,
        calls,
        seconds,
        accuracy,
        diversity,
    )
    return row, x
