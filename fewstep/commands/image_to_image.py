"""`fewstep image-to-image`: content against style over the strength, of a run's student and of its teacher."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.assist import noised_again
from fewstep.algebra.guidance import guided_teacher
from fewstep.algebra.onward import begun_at, onward
from fewstep.algebra.sampling import seeded
from fewstep.commands.options import parse_classes
from fewstep.commands.pictures import require_finite, save_grid
from fewstep.commands.report import console, opened
from fewstep.config import UserError
from fewstep.eval.features.base import FeatureExtractor
from fewstep.eval.features.extractors import build_extractor
from fewstep.eval.metrics.estimate import Estimate
from fewstep.eval.metrics.measures import class_accuracy
from fewstep.eval.protocol.images import to_pixels
from fewstep.files import atomic_path
from fewstep.networks.scores import HOUSE
from fewstep.train.product import Product, teacher_beside

SHOWN = 10
"""Pictures of the sheet."""
BATCH = 256


def parse_strengths(text: str) -> tuple[float, ...]:
    """'.25,.5' as numbers in (0, 1]; UserError names what is none."""
    out: list[float] = []
    for piece in text.split(","):
        try:
            value = float(piece)
        except ValueError:
            value = float("nan")
        if not 0 < value <= 1:
            raise UserError(f"--strengths {text!r}: expected numbers in (0, 1] such as .25,.5,.75, not {piece.strip()!r}")
        out.append(value)
    return tuple(sorted(set(out)))


@dataclass(frozen=True)
class Point:
    """One strength of one model: content, the correlation with the source; style, the accuracy at the class asked for.

    calls: of the network, a guided call of the teacher's, of two halves, being one.
    """

    model: str
    strength: float
    calls: int
    content: float
    content_error: float
    style: float
    style_error: float


def correlation(x: Tensor, source: Tensor) -> Estimate:
    """Mean over samples of Pearson's correlation of a picture (N, ...) with its source; 0 for a picture of one value."""
    a, b = (v.double().flatten(1) for v in (x, source))
    a, b = (v - v.mean(1, keepdim=True) for v in (a, b))
    size = (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-12)
    each = (a * b).sum(1) / size
    return Estimate(value=float(each.mean()), standard_error=float(each.std() / len(each) ** 0.5), n=len(each))


def house_of(product: Product) -> FeatureExtractor:
    """The classifier that tells the style of a product's samples. UserError where none does."""
    if product.paired is not None or product.prompted is not None:
        raise UserError(
            f"{product.title}: the curve needs a run whose only condition is a class; this one is made from pictures or "
            "text, which say already what is to become of them"
        )
    shape = product.picture_shape()
    if len(shape) != 3 or shape[0] != 1 or shape[-1] not in HOUSE or not product.classes:
        sides = " or ".join(f"{n} x {n}" for n in HOUSE)
        raise UserError(
            f"{product.title}: the curve needs a class-conditional run on grey pictures of {sides}, whose classes the "
            f"house classifier tells; these are {list(shape)} of {product.classes} classes"
        )
    return build_extractor(HOUSE[shape[-1]])


def sources(product: Product, source: str | None, target: str | None, count: int) -> tuple[Tensor, Tensor]:
    """(pictures (count, c, h, w), classes to make of them int64 (count,)): those of `source` in turn, all by default.

    Without a target every picture is to become the next class.
    """
    assert product.recipe is not None
    data: Any = product.recipe.data.open()
    pictures, labels = data.all()
    if labels is None:
        raise UserError(f"{product.title}: its data have no classes")
    rows = getattr(data, "held", ())
    rows = rows if len(rows) else torch.arange(len(pictures))
    if source is not None:
        wanted = torch.tensor(parse_classes(source, product.classes))
        rows = rows[torch.isin(labels[rows], wanted)]
    if not len(rows):
        raise UserError(f"--source {source}: the data have no such picture")
    rows = rows[torch.arange(count) % len(rows)]
    if target is None:
        return pictures[rows], (labels[rows] + 1) % product.classes
    asked = torch.tensor(parse_classes(target, product.classes))
    return pictures[rows], asked[torch.arange(count) % len(asked)]


def curve(
    path: Path,
    strengths: Sequence[float],
    source: str | None = None,
    target: str | None = None,
    count: int = 500,
    seed: int = 0,
    out: Path | None = None,
) -> list[Point]:
    """Measure the student, and its teacher's SDEdit at as many calls, and write curve.csv, curve.png and sheet.png."""
    product = opened(path)
    if product.recipe is None:
        raise UserError(f"{path}: is no run of fewstep; only a run knows its data and its teacher")
    house = house_of(product)
    for strength in strengths:
        try:
            begun_at(product.sampler, strength)
        except ValueError as error:
            raise UserError(f"--strengths: {error}") from None
    x, labels = sources(product, source, target, count)
    folder = path / "image-to-image" if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    teacher: Any = None
    if product.recipe.teacher is not None:
        teacher = _guided_teacher(product)
    found: list[Point] = []
    sheet = [x[:SHOWN]]  # a row of sources, then one of the student's at each strength
    for strength in sorted(strengths):
        begun = begun_at(product.sampler, strength)
        calls = len(begun.steps)
        models: list[tuple[str, Callable[[slice], Tensor]]] = [
            ("student", lambda part, s=strength: _student(product, x[part], labels[part], part, seed, s))
        ]
        if teacher is not None:
            models.append(
                ("teacher", lambda part, s=strength, n=calls: _teacher(teacher, x[part], labels[part], part, seed, s, n))
            )
        for name, draw in models:
            made = torch.cat([draw(part) for part in _parts(count)])
            require_finite(made, f"{path}, strength {strength:g}")
            found.append(_point(name, strength, calls, made, x, labels, house))
            if name == "student":
                sheet.append(made[:SHOWN])
    _write(found, folder)
    save_grid(torch.cat(sheet), folder / "sheet.png", len(sheet[0]))
    _say(found, folder)
    return found


def _guided_teacher(product: Product) -> Any:
    """The teacher at the scale that `evaluate.guidance` measures it at."""
    recipe: Any = product.recipe
    data = recipe.data.open()
    scale = recipe.shown_guidance()
    if scale != 1:
        console.print(
            f"teacher at guidance {scale:g}: each of its calls is of two halves", highlight=False, soft_wrap=True
        )
    return guided_teacher(teacher_beside(recipe, data, product.title, product.checkpoint), scale, data.null)


def _parts(count: int) -> Iterator[slice]:
    return (slice(i, min(i + BATCH, count)) for i in range(0, count, BATCH))


@torch.no_grad()
def _student(product: Product, x: Tensor, labels: Tensor, part: slice, seed: int, strength: float) -> Tensor:
    noise, fresh = seeded(seed, torch.arange(part.start, part.stop), tuple(product.shape))
    return onward(product.sampler, product.net, x, noise, labels, fresh, strength=strength)


@torch.no_grad()
def _teacher(teacher: Any, x: Tensor, labels: Tensor, part: slice, seed: int, strength: float, calls: int) -> Tensor:
    noise, _ = seeded(seed, torch.arange(part.start, part.stop), tuple(x.shape[1:]))
    return noised_again(teacher, x, noise, labels, level=strength, steps=calls, solver="ddim")


def _point(
    name: str, strength: float, calls: int, made: Tensor, x: Tensor, labels: Tensor, house: FeatureExtractor
) -> Point:
    from_features: Any = getattr(house, "from_features")  # noqa: B009  the protocol has it only where there are classes
    with torch.no_grad():
        logits = from_features(house(to_pixels(made).float()))
    content, style = correlation(made, x), class_accuracy(logits, labels)
    errors = [float(e.standard_error or 0.0) for e in (content, style)]
    return Point(name, strength, calls, content.value, errors[0], style.value, errors[1])


def _write(found: Sequence[Point], folder: Path) -> None:
    with atomic_path(folder / "curve.csv") as temporary, temporary.open("w", newline="") as file:
        rows = csv.DictWriter(file, [f.name for f in fields(Point)])
        rows.writeheader()
        rows.writerows(asdict(p) for p in found)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 4))
    for name in dict.fromkeys(p.model for p in found):
        mine = [p for p in found if p.model == name]
        axis.plot([p.content for p in mine], [p.style for p in mine], "-o", ms=3, label=name)
        for p in mine:
            axis.annotate(f"{p.strength:g}", (p.content, p.style), fontsize=7)
    axis.set(xlabel="content: correlation with the source", ylabel="style: accuracy at the class asked for")
    axis.legend()
    try:
        with atomic_path(folder / "curve.png") as temporary:
            figure.savefig(temporary, dpi=100, bbox_inches="tight")
    finally:
        plt.close(figure)


def _say(found: Sequence[Point], folder: Path) -> None:
    for p in found:
        told = f"{p.model:8} strength {p.strength:<5g} {p.calls} calls  content {p.content:.3f}  style {p.style:.3f}"
        console.print(told, highlight=False, soft_wrap=True)
    console.print(f"curve {folder}", highlight=False, soft_wrap=True)
