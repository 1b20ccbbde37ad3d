"""The readings of a run as one picture, with the lines at which `fewstep health` raises an alarm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from fewstep.files import atomic_path
from fewstep.recipe.expected import Expected
from fewstep.train import lines, verdicts


@dataclass(frozen=True)
class Panel:
    """One reading: its curves by label, the levels of alarm, and whether its scale is logarithmic."""

    title: str
    curves: dict[str, str]
    lines: tuple[float, ...] = ()
    log: bool = False
    best: bool = False
    """Draw the running best beside the curve: the least for a loss."""
    share: float | None = None
    """Draw this share of the running maximum."""


PANELS = (
    Panel(
        "critic lag: slope on fresh samples",
        {"slope": "health/critic_slope"},
        (1 - verdicts.LAG, 1 + verdicts.LAG),
    ),
    Panel("denoising loss", {"loss": "dsm"}, log=True, best=True),
    Panel(
        "matching gradient by noise level",
        {f"quarter {k + 1}": f"health/gradient_{k}" for k in range(4)},
        log=True,
    ),
    Panel(
        "discriminator accuracy",
        {"real and generated": "discriminator_accuracy"},
        (verdicts.LOSE, verdicts.WIN),
    ),
    Panel(
        "contrast against the teacher's denoiser",
        {"ratio": "health/contrast"},
        (lines.FADE, lines.SATURATE),
    ),
    Panel("diversity within classes", {"spread": "health/diversity"}, share=lines.SHRINK),
    Panel(
        "brightness of samples, in the reference's deviations",
        {"mean less chance": "samples/mean", "mean": "samples/offset"},
        (-lines.SHIFT, lines.SHIFT),
    ),
    Panel(
        "samples over the reference's",
        {"contrast": "samples/contrast", "colours": "samples/saturation", "spread": "samples/spread"},
        (lines.SHRINK, lines.SATURATE),
    ),
    Panel("grid of samples over the reference's", {"peak": "samples/grid"}, (lines.GRID,)),
    Panel("reward of samples above the reference's, in its deviations", {"reward": "samples/reward"}),
    Panel("FD of samples over the reference's variance", {"FD": "samples/fd"}),
)


def points(records: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(steps done, values) of the records that have a reading."""
    found = [(float(r["done"]), float(r[key])) for r in records if isinstance(r.get(key), (int, float)) and "done" in r]
    return [d for d, _ in found], [v for _, v in found]


def present(records: Sequence[dict[str, Any]], expected: Expected | None = None) -> list[Panel]:
    """Panels of which a log has at least one curve; with bands also one for each banded reading that no panel has."""
    shown = {key for panel in PANELS for key in panel.curves.values()}
    more = [Panel(key, {key: key}) for key in (expected.bands if expected else ()) if key not in shown]
    return [p for p in (*PANELS, *more) if any(points(records, key)[0] for key in p.curves.values())]


def figure_of(records: Sequence[dict[str, Any]], expected: Expected | None = None, start: int = 0) -> Any:
    """The panels of a log as one figure of matplotlib, that needs no window; None when the log has no readings.

    expected: bands to draw behind the curves; start: steps done before the stage that they are of.
    """
    panels = present(records, expected)
    if not panels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 2.8 * rows), dpi=90)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True)
    for axis, panel in zip(axes.flat, panels, strict=False):
        if expected:
            _shade(axis, panel, expected, start)
        _draw(axis, panel, records)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout()
    return figure


def save(records: Sequence[dict[str, Any]], path: Path, expected: Expected | None = None, start: int = 0) -> list[str]:
    """Write the picture; returns the titles of its panels, none when the log has no readings (nothing is written)."""
    figure = figure_of(records, expected, start)
    if figure is None:
        return []
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
    return [p.title for p in present(records, expected)]


def _shade(axis: Any, panel: Panel, expected: Expected, start: int) -> None:
    """The bands of a panel's curves, part by part."""
    edges = [start, *(start + end for end in expected.ends)]
    for key in panel.curves.values():
        if band := expected.bands.get(key):
            low, high = ([*ends, ends[-1]] for ends in (band.low, band.high))
            label = f"{expected.runs} reference run{'s' * (expected.runs > 1)}" if len(panel.curves) == 1 else None
            axis.fill_between(edges, low, high, step="post", color="tab:green", alpha=0.15, linewidth=0, label=label)


def _draw(axis: Any, panel: Panel, records: Sequence[dict[str, Any]]) -> None:
    for label, key in panel.curves.items():
        x, y = points(records, key)
        if not x:
            continue
        axis.plot(x, y, label=label, linewidth=1.2)
        if panel.best:
            axis.plot(x, list(accumulate(y, min)), label="best so far", linewidth=1, linestyle=":")
        if panel.share is not None:
            limit = [panel.share * v for v in accumulate(y, max)]
            axis.plot(x, limit, label=f"{panel.share:g} of the best", color="tab:red", linestyle="--")
    for level in panel.lines:
        axis.axhline(level, color="tab:red", linestyle="--", linewidth=1)
    if panel.log:
        axis.set_yscale("log")
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("steps")
    axis.legend(fontsize=8)
