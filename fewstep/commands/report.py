"""What is printed of evaluations, and a student beside its teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fewstep.commands.judge import Judge
from fewstep.commands.measure import measure, teacher_product
from fewstep.config import UserError
from fewstep.eval.metrics.estimate import Estimate
from fewstep.eval.protocol.evaluation import Evaluation, distance_of, format_entry
from fewstep.files import read_json
from fewstep.train.peak import Peak
from fewstep.train.product import Product, open_product, teacher_beside
from fewstep.train.state import checkpoints
from fewstep.train.trainer import Trainer

console = Console()
GRID = 100
COLUMNS = 4
"""Metrics that fit into the table of a terminal; of more a list is printed."""


def say(text: str) -> None:
    """Print as it is: names and numbers of the user's, in lines that the terminal wraps."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def first_teacher(trainer: Trainer) -> Any:
    """The recipe's teacher, or None; built again where stages have written into its module, or it is sharded.

    One that only a stage fills is the one that the last stage had.
    """
    again = trainer.recipe.overwrites_teacher() and not trainer.recipe.fills_teacher()
    if not again and not trainer.session.sharded:
        return trainer.roles.get("teacher")
    if trainer.recipe.teacher is None:
        return None
    run = trainer.run or Path()
    saved = next(reversed(checkpoints(run / "checkpoints")), None)
    return teacher_beside(trainer.recipe, trainer.data, str(run), saved).to(trainer.device)


def shown_teacher(product: Product, data: Any, required: bool) -> Any:
    """The teacher of a run's product, on its device, to be drawn beside it; None with a line where it is not trained yet.

    UserError where it is required.
    """
    try:
        return teacher_beside(product.recipe, data, product.title, product.checkpoint).to(product.device())  # type: ignore[arg-type]
    except UserError as error:
        if required:
            raise
        say(f"note: {error}; it is left out")
        return None


def measure_and_tell(product: Product, judge: Judge) -> tuple[Evaluation, Any]:
    """`measure`, with a bar or lines of how far it is."""
    return measure(product, judge, say=say, console=console)


def compare(
    student: Product, judge: Judge, teacher: Any, teacher_steps: Sequence[int]
) -> tuple[list[Evaluation], list[tuple[str, Any]]]:
    """Teacher at 1 step, teacher at its best number of steps, student; and the first samples of each."""
    rows, panels = [], []
    if teacher is not None:
        many = [measure_and_tell(teacher_product(student, teacher, n), judge) for n in teacher_steps]
        ranked = [m for m in many if distance_of(m[0])]
        best = min((m for m in ranked if m[0].calls != 1), key=lambda m: m[0].distance.value, default=None)
        shown = [m for m in many if m[0].calls == 1] + ([best] if best else [])
        least = min((m[0].distance.value for m in ranked), default=None)
        for row, x in shown:
            wins = len(many) > 1 and row.calls != 1 and row.distance.value == least
            title = row.name + (" (best)" if wins else "")
            rows.append(replace(row, name=title))
            panels.append((title, _panel(x)))
    row, x = measure_and_tell(student, judge)
    return [*rows, row], [*panels, (row.name, _panel(x))]


def _panel(x: Any) -> Any:
    return x[: GRID // 2] if x.ndim > 2 else x[:2000]


def read_results(path: Path) -> list[Evaluation]:
    """The rows of a run's results.json; UserError when it is not one."""
    try:
        return [checked_row(row) for row in read_json(path)["rows"]]
    except KeyError:
        raise UserError(f"{path}: has no rows; delete it, or measure the run again") from None
    except (UserError, ValueError, TypeError) as error:
        where = "" if str(error).startswith(str(path)) else f"{path}: "
        raise UserError(f"{where}{error}; delete it, or measure the run again") from None


def checked_row(row: Any) -> Evaluation:
    """An evaluation from a file whose name, number of samples and distance can be shown. ValueError for another."""
    found = Evaluation.from_json(row)
    texts = (found.name, found.group, found.preset)
    good = all(isinstance(t, str) for t in texts) and isinstance(found.number, int) and isinstance(found.metrics, dict)
    values = found.metrics.values() if good else ()
    if not good or not all(isinstance(v, dict) and isinstance(v.get("value"), int | float | None) for v in values):
        raise ValueError("a row's name, number or metrics is not as fewstep writes it")
    return found


def opened(path: Path) -> Product:
    """`open_product`, with a line printed for everything outside it that has changed since."""
    product = open_product(path)
    for line in product.changed:
        say(f"note: {line}")
    return product


def card_results(evaluations: Sequence[Evaluation]) -> list[tuple[str, str]]:
    """The distance of each model, as a model card states it."""
    ranked = [(e, distance_of(e)) for e in evaluations]
    return [(f"{name}, {e.name}, {e.number} samples", f"{e.distance.value:.4g}") for e, name in ranked if name]


def card_peak(best: Peak | None) -> list[tuple[str, str]]:
    """Where the run was best, as a model card states it."""
    return [("iterations to the peak", str(best))] if best else []


def show(evaluations: Sequence[Evaluation]) -> None:
    """Print every metric of every model: as a table where one has room for them, else as lists."""
    if max(len(e.metrics) for e in evaluations) <= COLUMNS:
        _table(evaluations)
    else:
        _list(evaluations)
    for e in evaluations:
        lines = [f"against {e.reference}"] if e.reference and e is evaluations[0] else []
        lines += [f"left out: {name}: {reason}" for name, reason in e.omitted.items()]
        if e.skipped:
            lines.append(f"{len(e.skipped)} images skipped:")
            lines += [f"  {name}: {reason}" for name, reason in e.skipped.items()]
        if lines:
            say("\n".join([f"{e.name}:", *(f"  {line}" for line in lines)]))


def _table(evaluations: Sequence[Evaluation]) -> None:
    first = evaluations[0]
    names = list(dict.fromkeys(name for e in evaluations for name in e.metrics))
    out = Table(box=None, pad_edge=False, header_style="bold")
    out.add_column("", overflow="ellipsis", no_wrap=True, ratio=1)
    for name in [*(name.partition(" (")[0] for name in names), "calls", "s / 1000"]:
        out.add_column(_SHORT.get(name, name), justify="right", no_wrap=True)
    for e in evaluations:
        cells = [_cell(name, e.metrics.get(name)) for name in names]
        speed = "" if e.seconds is None else f"{e.seconds:.2f}"
        out.add_row(e.name, *cells, "" if e.calls is None else str(e.calls), speed)
    console.print(f"{first.preset} ({first.preset_hash}), {first.number:,} samples", soft_wrap=True, highlight=False)
    console.print(out, highlight=False)
    notes = [f"{', '.join(names)}; ± one standard error"]
    notes += ["calls: of the network, each sample; s / 1000: seconds, warm; on a CPU processor time of one thread"]
    if any(f.standard_error is None for e in evaluations for f in e.frechet):
        notes.append("without ±: no more samples than features, far too few for a distance that says anything")
    console.print("\n".join(notes), soft_wrap=True, highlight=False)


_SHORT = {"class accuracy": "accuracy", "within-class diversity": "diversity"}


def _cell(name: str, entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return "-"
    if name.startswith(("class accuracy", "caption found")):
        return f"{100 * entry['value']:.1f} %"
    return with_error(Estimate(value=entry["value"], standard_error=entry.get("standard_error")))


def with_error(estimate: Estimate, sign: str = "") -> str:
    """`1.28 ± 0.34`, the value with as many decimals as its error, which has two digits."""
    value, error = estimate.value, estimate.standard_error
    if error is None or math.isnan(error):
        return f"{value:{sign}.4g}"
    decimals = min(6, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else 3
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"


def _list(evaluations: Sequence[Evaluation]) -> None:
    for e in evaluations:
        calls = "" if e.calls is None else f", {e.calls} network call{'s' * (e.calls != 1)} each"
        speed = "" if e.seconds is None else f", {e.seconds:.3g} s per 1,000"
        lines = [f"{e.name}: {e.preset} ({e.preset_hash}), {e.number} images{calls}{speed}"]
        lines += [f"  {name}: {format_entry(entry)}" for name, entry in e.metrics.items()]
        say("\n".join(lines))
