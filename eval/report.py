"""One self-contained page per evaluation: grids, metrics against steps with bars, latency, Pareto plot, provenance."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.eval.page import as_png, document, picture, plot, table
from fewstep.eval.protocol.evaluation import Columns, Evaluation, comparison_rows, distance_of
from fewstep.files import atomic_path

LEGEND = 12
"""Models that a plot can name; of more only the best are."""
SAMPLING_NOTE = (
    "± is one standard error of sampling. b/N is the expected excess of FD at this number of images; the corrected "
    "value takes it off and is given only where b/N does not exceed it."
)


def write_report(
    evaluations: Sequence[Evaluation],
    folder: str | Path,
    title: str = "Evaluation",
    notes: Sequence[str] = (SAMPLING_NOTE,),
    columns: Columns | None = None,
) -> Path:
    """Write ``report.html`` (no outside files) and ``report.json`` into `folder`; returns the page's path.

    `notes` are paragraphs under the table: what its errors mean, what is missing from it; `columns`
    are further ones of it.

    Raises:
        ValueError: no evaluations. PresetMismatch: evaluations of different protocols.
    """
    if not evaluations:
        raise ValueError("evaluations: none were given")
    header, rows = comparison_rows(evaluations, columns)
    first = evaluations[0]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="note">Protocol <b>{html.escape(first.preset)}</b>, hash <code>{first.preset_hash}</code>, '
        f"features {html.escape(first.extractor)}, {first.number:,} images a row.</p>",
        "<h2>Results</h2>",
        table(header, rows),
        *(f'<p class="note">{html.escape(note)}</p>' for note in notes),
        *_notes(evaluations),
        *_grids(evaluations),
        *_plots(evaluations),
        *_latency(evaluations),
        "<h2>Environment</h2>",
        table(["", "value"], [*map(list, first.environment.items()), *_files(evaluations)]),
    ]
    folder = Path(folder)
    content = [e.as_json() for e in evaluations]
    with atomic_path(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(document(title, parts))
    return folder / "report.html"


def image_grid(images: Tensor, columns: int = 8, gap: int = 1) -> Tensor:
    """Pixels (N, C, H, W) uint8 -> one uint8 picture (C, H', W') in rows of `columns`, white gaps between."""
    if images.ndim != 4 or images.dtype != torch.uint8 or not len(images):
        raise ValueError(f"images: expected uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = torch.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    return canvas


def _notes(evaluations: Sequence[Evaluation]) -> list[str]:
    notes = []
    for e in evaluations:
        for metric, reason in e.omitted.items():
            notes.append(f"{e.name}: {metric} left out: {reason}")
        if e.skipped:
            sample = "; ".join(f"{name} {reason}" for name, reason in list(e.skipped.items())[:3])
            notes.append(f"{e.name}: {len(e.skipped)} images excluded ({sample})")
    if not notes:
        return []
    return ["<h2>Left out</h2><ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>"]


def _files(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    found = {kind: digest for e in evaluations for kind, digest in e.files.items()}
    return [[f"sha256 of {kind}", digest] for kind, digest in found.items()]


def _grids(evaluations: Sequence[Evaluation]) -> list[str]:
    shown = [(e, e.images) for e in evaluations if e.images is not None]
    if not shown:
        return []
    from PIL import Image

    parts = ['<h2>Samples</h2><p class="note">The same global indices, so the same noise, in every grid.</p>']
    parts.append('<div class="grids">')
    for e, images in shown:
        pixels = image_grid(images).permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "png")
        calls = f" ({e.calls} network call{'' if e.calls == 1 else 's'})" if e.calls else ""
        parts.append(picture(buffer.getvalue(), f"{e.name}{calls}", f"samples of {e.name}"))
    return [*parts, "</div>"]


def _value_of(evaluation: Evaluation, metric: str) -> tuple[float, float] | None:
    entry: Mapping[str, Any] | None = evaluation.metrics.get(metric)
    if entry is None or entry["value"] is None:
        return None
    return float(entry["value"]), float(entry.get("standard_error") or 0.0)


def _plots(evaluations: Sequence[Evaluation]) -> list[str]:
    metrics = list(evaluations[0].metrics)
    figures = []
    counted = [e for e in evaluations if e.calls]
    if len({e.calls for e in counted}) > 1:
        for metric in metrics[:6]:
            figures.append((f"{metric} against network calls", _lines(counted, metric)))
    distance = distance_of(evaluations[0])
    timed = [e for e in evaluations if e.seconds]
    if len(timed) > 1 and distance:
        figures.append((f"{distance} against time: lower left is better", _pareto(timed, distance)))
    if not figures:
        return []
    parts = ['<h2>Plots</h2><div class="plots">']
    for caption, data in figures:
        parts.append(picture(data, caption))
    return [*parts, "</div>"]


def _scale(axes: Any, found: Sequence[tuple[float, float]]) -> None:
    """Logarithmic where positive values are so far apart that a line would hide the small ones."""
    lowest = min((value - error for value, error in found), default=0.0)
    if lowest > 0 and max(value for value, _ in found) > 20 * min(value for value, _ in found):
        axes.set_yscale("log")


def _named(evaluations: Sequence[Evaluation], metric: str) -> list[str]:
    """The groups that a legend has room for: all, or those of the best values."""
    best: dict[str, float] = {}
    for e in evaluations:
        if (found := _value_of(e, metric)) is not None:
            best[e.group] = min(found[0], best.get(e.group, found[0]))
    return sorted(best, key=lambda group: best[group])[:LEGEND] if len(best) > LEGEND else list(best)


def _lines(evaluations: Sequence[Evaluation], metric: str) -> bytes:
    figure, axes = plot()
    named = _named(evaluations, metric)
    for group in dict.fromkeys(e.group for e in evaluations):
        points = sorted(
            (e.calls, *found) for e in evaluations if e.group == group and (found := _value_of(e, metric)) is not None
        )
        if points:
            steps, values, errors = zip(*points, strict=True)
            look = {"label": group or None} if group in named else {"color": "lightgrey", "zorder": 0}
            axes.errorbar(steps, values, yerr=errors, marker="o", capsize=3, **look)
    _scale(axes, [v for e in evaluations if (v := _value_of(e, metric)) is not None])
    ticks = sorted({e.calls for e in evaluations if e.calls})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.set_xlabel("network calls")
    axes.set_ylabel(metric)
    if any(e.group for e in evaluations):
        axes.legend(frameon=False, fontsize=7 if len(named) > 6 else None)
    return as_png(figure)


def _pareto(evaluations: Sequence[Evaluation], metric: str) -> bytes:
    figure, axes = plot()
    points = []
    for e in evaluations:
        found = _value_of(e, metric)
        if found is None or e.seconds is None:
            continue
        value, error = found
        axes.errorbar(e.seconds, value, yerr=error, marker="o", color="tab:blue", capsize=3)
        points.append((e.seconds, value, e.name))
    front: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    for seconds, value, name in points if len(points) <= LEGEND else front:
        axes.annotate(name, (seconds, value), (6, 5), textcoords="offset points")
    axes.plot(
        [point[0] for point in front],
        [point[1] for point in front],
        color="tab:orange",
        zorder=0,
        label="best at its speed or faster",
    )
    axes.set_xscale("log")
    _scale(axes, [v for e in evaluations if (v := _value_of(e, metric)) is not None])
    axes.margins(0.2)
    axes.set_xlabel("seconds per 1,000 images")
    axes.set_ylabel(metric)
    axes.legend(frameon=False)
    return as_png(figure)


def _latency(evaluations: Sequence[Evaluation]) -> list[str]:
    rows = []
    for e in evaluations:
        for item in e.latency:
            memory = "CPU" if item.peak_bytes is None else f"{item.peak_bytes / 2**20:.0f} MiB"
            times = [f"{1000 * item.p50:.3g}", f"{1000 * item.p95:.3g}", f"{item.images_per_second:.4g}"]
            rows.append([e.name, str(e.calls), str(item.batch_size), *times, memory])
    if not rows:
        return []
    header = ["model", "steps", "batch", "p50 ms", "p95 ms", "images / s", "peak memory"]
    return ["<h2>Latency</h2>", table(header, rows)]
