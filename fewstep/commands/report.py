"""The table and panels of measured rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from fewstep.commands.measure import Measured, measure, teacher_product
from fewstep.recipe.schema import Evaluate
from fewstep.train.build import build_roles
from fewstep.train.product import Product
from fewstep.train.trainer import Trainer

console = Console()
GRID = 100


def first_teacher(trainer: Trainer) -> Any:
    """The recipe's teacher, or None; built again where stages have written into its module, or it is sharded."""
    if not trainer.recipe.overwrites_teacher() and not trainer.session.sharded:
        return trainer.roles.get("teacher")
    teacher = build_roles(trainer.recipe, trainer.data).get("teacher")
    return teacher.to(trainer.device) if teacher is not None else None


def compare(student: Product, spec: Evaluate, teacher: Any) -> tuple[list[Measured], list[tuple[str, Any]]]:
    """Teacher at 1 step, teacher at its best number of steps, student; and the first samples of each."""
    rows, panels = [], []
    if teacher is not None:
        many = []
        for n in spec.teacher_steps:
            row, x = measure(teacher_product(student, teacher, n), spec)
            many.append((row, x))
        best = min((m for m in many if m[0].calls > 1), key=lambda m: m[0].value, default=None)
        shown = [m for m in many if m[0].calls == 1] + ([best] if best else [])
        least = min((m[0].value for m in many), default=None)
        for row, x in shown:
            wins = len(many) > 1 and row.calls > 1 and row.value == least
            title = row.title + (" (best)" if wins else "")
            rows.append(replace(row, title=title))
            panels.append((title, _panel(x)))
    row, x = measure(student, spec)
    return [*rows, row], [*panels, (row.title, _panel(x))]


def _panel(x: Any) -> Any:
    return x[: GRID // 2] if x.ndim > 2 else x[:2000]


def table(rows: Sequence[Measured]) -> None:
    """Print measured rows."""
    out = Table(
        title=f"{rows[0].metric} (± one standard error; lower is better), network calls, seconds per 1000"
    )
    columns = ["", "distance", "samples", "calls", "s / 1000"]
    extra = rows[0].accuracy is not None
    found = rows[0].retrieval is not None
    for name in columns + (["accuracy", "diversity"] if extra else []) + (["caption found"] if found else []):
        out.add_column(name, justify="left" if not name else "right")
    for r in rows:
        value = f"{r.value:.4g}" + (f" ± {r.error:.2g}" if r.error is not None else "")
        cells = [r.title, value, str(r.samples), str(r.calls), f"{r.seconds_per_1000:.2f}"]
        if extra:
            cells += [f"{100 * (r.accuracy or 0):.1f} %", f"{r.diversity:.3f}"]
        if found:
            cells.append(f"{100 * (r.retrieval or 0):.1f} %")
        out.add_row(*cells)
    if any(r.frechet is not None and r.error is None for r in rows):
        out.caption = (
            "without ±: no more samples than features, far too few for a distance that says anything"
        )
    console.print(out)
