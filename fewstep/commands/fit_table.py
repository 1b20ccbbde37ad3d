"""What fitting gave: every sampler of as many calls, by a metric or by its distance from the fine trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from fewstep.commands.fitting import Wish, beside, distances
from fewstep.commands.judge import Judge
from fewstep.commands.report import console, measure_and_tell, say, with_error
from fewstep.eval.metrics.estimate import Estimate
from fewstep.eval.protocol.evaluation import distance_of
from fewstep.train.fitted import Fitted
from fewstep.train.product import Product

FINE = "distance to the fine trajectory"
HELD_OUT = 60
"""Noises of that distance."""

Row = Mapping[str, Any]


def measured(product: Product, fitted: Fitted, wish: Wish, judge: Judge | None) -> tuple[Row, ...]:
    """A row per number of calls and sampler: calls, name, metric, value, error, samples.

    product: the teacher, guided. Without a judge: root mean squared differences from DDIM through twice the points, on
    noises that are no calibration noises.
    """
    rows: list[Row] = []
    for sampler in fitted.samplers:
        named = beside(product, sampler)
        if judge is None:
            gaps = distances(product, [s for _, s in named], wish.seed, HELD_OUT, wish.points)
            found = [(FINE, float(g.mean()), float(g.std() / len(g) ** 0.5), HELD_OUT) for g in gaps]
        else:
            found = [_by_metric(product, s, name, judge) for name, s in named]
        for (name, s), (metric, value, error, samples) in zip(named, found, strict=True):
            told = {"metric": metric, "value": value, "error": error, "samples": samples}
            rows.append({"calls": len(s.steps), "name": name, **told})
    return tuple(rows)


def _by_metric(product: Product, sampler: Any, name: str, judge: Judge) -> tuple[str, float, float | None, int]:
    calls = len(sampler.steps)
    told = replace(product, sampler=sampler, title=f"{name}, {calls} calls", trained=None)
    row, _ = measure_and_tell(told, judge)
    say(f"{row.name}: {distance_of(row)} {with_error(row.distance)}")
    return str(distance_of(row)), row.distance.value, row.distance.standard_error, row.number


def pivot(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(heads, lines): a line per sampler, a column per number of calls."""
    calls = sorted({r["calls"] for r in rows})
    names = list(dict.fromkeys(r["name"] for r in rows))
    known = {(r["name"], r["calls"]): Estimate(value=r["value"], standard_error=r["error"]) for r in rows}
    lines = [[n, *(with_error(known[n, c]) if (n, c) in known else "" for c in calls)] for n in names]
    return ["", *(f"{c} call{'s' * (c > 1)}" for c in calls)], lines


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    heads, lines = pivot(rows)
    out = Table(box=None, pad_edge=False, header_style="bold")
    for i, head in enumerate(heads):
        out.add_column(head, justify="right" if i else "left", no_wrap=True)
    for line in lines:
        out.add_row(*line)
    say(f"{rows[0]['metric']}, {rows[0]['samples']} samples; ± one standard error")
    console.print(out, highlight=False)
