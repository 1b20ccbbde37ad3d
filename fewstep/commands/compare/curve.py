"""The distance of a run while it trains, over the processor seconds it has spent: one line a recipe in one picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.commands.compare.budget import Accounted
from fewstep.config import UserError
from fewstep.files import atomic_path, parse_json

NEAR = 0.05
"""Share of its end within which a distance counts as settled."""
Point = dict[str, float]


def marks(lengths: Sequence[int], points: int) -> set[int]:
    """Updates after which to measure: evenly over the last stage up to its end, which is measured anyhow.

    And at the end of the stage before it. What lies before are starts that recipes share, often the longer part.

    >>> sorted(fewstep.commands.compare.curve.marks([100], 4))
    [25, 50, 75]
    >>> sorted(fewstep.commands.compare.curve.marks([3000, 400], 4))
    [3000, 3100, 3200, 3300]
    """
    last, start = lengths[-1], sum(lengths[:-1])
    return {start + round(last * k / points) for k in range(points)} - {0, start + last}


class Curve:
    """The points of one run, a line each in RUN/curve.jsonl.

    Args:
        path: its file; points that a continued run has not reached yet are dropped.
        wanted: updates after which to measure.
        distance: measures the run's student as it stands.
    """

    def __init__(self, path: Path, wanted: set[int], distance: Callable[[], float]) -> None:
        self.path, self.wanted, self.distance = path, wanted, distance

    def cut(self, done: int) -> None:
        """Keep the wanted points of the first `done` updates."""
        kept = [p for p in read(self.path) if p["updates"] <= done and p["updates"] in self.wanted]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(p) + "\n" for p in kept))

    def add(self, account: Accounted) -> None:
        """Measure where it is due; what that takes is not charged to the run."""
        done, spent = account.trainer.progress.done, account.spent
        if done not in self.wanted:
            return
        cost = {"seconds": spent.seconds, "cpu_seconds": spent.cpu_seconds, "network_calls": spent.calls}
        with account.aside():
            value = self.distance()
        with self.path.open("a") as f:
            f.write(json.dumps({"updates": done, **cost, "value": value}) + "\n")


def read(path: Path) -> list[Point]:
    """The whole lines of a curve's file, none where there is no file."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            point = parse_json(line, path)
            found.append({k: float(point[k]) for k in ("updates", "seconds", "cpu_seconds", "network_calls", "value")})
        except (UserError, KeyError, TypeError, ValueError):
            continue  # a line that a kill left incomplete
    return found


def settled(points: Sequence[Mapping[str, float]], unit: str = "cpu_seconds") -> float | None:
    """What had been spent at the first point from which on all distances are within NEAR of the last one's.

    None for the last point itself: it had not settled before its end; nor has a run whose end is no number.

    >>> run = [{"cpu_seconds": s, "value": v} for s, v in ((1, 9.0), (2, 2.05), (3, 1.97), (4, 2.0))]
    >>> fewstep.commands.compare.curve.settled(run)
    2
    """
    if not points:
        return None
    end, first = points[-1]["value"], None
    if not math.isfinite(end):
        return None
    for point in reversed(points[:-1]):
        if not abs(point["value"] - end) <= NEAR * abs(end):  # nor is what is no number near
            break
        first = point[unit]
    return first


def save(curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], metric: str, path: Path) -> bool:
    """One line a run, one colour a recipe, axes logarithmic above zero; whether there was anything to draw."""
    drawn = {name: [run for run in runs if run] for name, runs in curves.items()}
    drawn = {name: runs for name, runs in drawn.items() if runs}
    if not drawn:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=100)
    FigureCanvasAgg(figure)
    axis: Any = figure.subplots()
    for number, (name, runs) in enumerate(drawn.items()):
        for k, run in enumerate(runs):
            x, y = [p["cpu_seconds"] for p in run], [p["value"] for p in run]
            style = ("-", "--", ":")[number // 10 % 3]
            axis.plot(x, y, style, color=f"C{number % 10}", marker=".", label=name if k == 0 else None, linewidth=1.2)
    axis.set_xscale("log")
    values = [v for runs in drawn.values() for run in runs for p in run if math.isfinite(v := p["value"])]
    if min(values, default=1.0) > 0:
        axis.set_yscale("log")
    else:  # an unbiased estimate falls below zero by its noise, so that what is as small is drawn evenly
        above = [v for v in values if v > 0]
        small = -min(values) or max(min(above, default=1.0), 1e-3 * max(above, default=1.0))
        axis.set_yscale("symlog", linthresh=small)
        axis.set_ylim(bottom=-2 * small)
    axis.set_xlabel("processor seconds of training")
    axis.set_ylabel(metric)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight")
    return True
