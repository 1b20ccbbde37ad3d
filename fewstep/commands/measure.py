"""What the command line measures: products by Frechet or energy distance, with time and network calls."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.sampling import many_step
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
from fewstep.eval.protocol.images import to_pixels
from fewstep.eval.protocol.resize import resize_tensor
from fewstep.recipe.schema import Evaluate
from fewstep.train.product import Product


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
    retrieval: float | None = None
    """Share of samples whose caption is found among 100."""
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


def judge_of_data(product: Product) -> tuple[Any, Reference]:
    """EfficientNet-lite0 on pictures enlarged to 224, and the run's own data seen by it; UserError without either."""
    from fewstep.eval.features.networks import effnet_lite0
    from fewstep.eval.protocol.reference import reference_of

    if product.recipe is None:
        raise UserError("metric fd-effnet-lite0 compares with a run's data; this folder does not say which")
    if len(product.picture_shape()) != 3 or product.picture_shape()[0] not in (1, 3):
        raise UserError(
            f"metric fd-effnet-lite0 is for pictures; these samples are {list(product.picture_shape())}"
        )
    try:
        extractor = Enlarged(effnet_lite0())
    except (ModuleNotFoundError, ValueError) as error:
        raise UserError(f"metric fd-effnet-lite0: {error}") from None
    real, _ = product.recipe.data.open().all()  # type: ignore[attr-defined]
    return extractor, reference_of("data", to_pixels(real), None, extractor)


class Enlarged:
    """A feature extractor behind clean-fid's bicubic resize to its own size."""

    def __init__(self, network: Any) -> None:
        self.network, self.dim, self.input_size = network, network.dim, None
        self.name, self.sha256 = f"{network.name}-enlarged", network.sha256

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(N, 1 or 3, h, w) in [0, 255] -> (N, dim) fp32."""
        size = self.network.input_size
        return torch.cat([self.network(resize_tensor(x, size, "bicubic")) for x in images.split(8)])


def judge_of_captions(product: Product, folder: str) -> Any:
    """The retrieval model of a folder; UserError when its captions are not those of the product's data."""
    from fewstep.eval.features.retrieval import Retrieval

    try:
        found = Retrieval.load(folder)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"evaluate.retrieval: {error}") from None
    data: Any = product.recipe.data.open() if product.recipe else None  # type: ignore[attr-defined]
    captions = tuple(getattr(item, "caption", None) for item in getattr(data, "items", ()))
    if captions != found.captions:
        raise UserError(
            f"evaluate.retrieval: {folder} was trained on {len(found.captions)} captions, which are not the "
            f"{len(captions)} of this run's data; train it on them with `fewstep train-retrieval`"
        )
    if tuple(product.picture_shape()[-2:]) != (found.network.size,) * 2:
        raise UserError(
            f"evaluate.retrieval: {folder} takes pictures of {found.network.size} x {found.network.size}, these are "
            f"{list(product.picture_shape())}"
        )
    return found


def judges(product: Product, spec: Evaluate) -> tuple[tuple[Any, Reference] | None, Any]:
    """What `measure` compares with: None for the energy distance; and the retrieval model, None without one.

    Raises UserError when the metric is not for this product's samples or a file that it needs is missing.
    """
    shape = product.picture_shape()
    captions = None if spec.retrieval is None else judge_of_captions(product, spec.retrieval)
    if spec.metric == "fd-effnet-lite0":
        return judge_of_data(product), captions
    if spec.metric != "energy":
        if product.classes and spec.samples < 2 * product.classes:
            raise UserError(
                f"samples {spec.samples}: the diversity within a class needs two of each, so at least "
                f"{2 * product.classes} for {product.classes} classes"
            )
        return judge(spec.metric, shape, product.classes), captions
    if len(shape) != 1:
        raise UserError(f"metric energy is for vectors; these samples are {list(shape)}")
    return None, captions


def check_metric(product: Product, spec: Evaluate) -> None:
    """Refuse before a sample is drawn what `measure` would refuse; raises as `judges`."""
    judges(product, spec)


def teacher_product(product: Product, teacher: Any, steps: int) -> Product:
    """The teacher of a run under a Heun sampler, with the run's shape and classes."""
    title = f"teacher, {steps} step{'s' * (steps > 1)}"
    return replace(product, net=teacher, sampler=many_step(steps), title=title, trained=None)


def measure(product: Product, spec: Evaluate, *, batch: int = 256) -> tuple[Measured, Tensor]:
    """Draw spec.samples samples of spec.seed on and measure them; returns the row and the samples."""
    judged, captions = judges(product, spec)
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
    retrieval = None
    if captions is not None:
        count = len(captions.captions)
        own = torch.arange(spec.samples) % count  # as `Product.labels` hands them out
        retrieval = captions.accuracy(to_pixels(x), own, min(100, count)).value
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
        retrieval,
        result,
    )
    return row, x
