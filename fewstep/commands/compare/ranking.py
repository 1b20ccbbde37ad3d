"""What a comparison says: means over seeds with their errors, differences from the best, a table and a page."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.eval.metrics.frechet import standard_error
from fewstep.eval.protocol.evaluate import Evaluation, environment
from fewstep.eval.protocol.latency import Latency
from fewstep.eval.report import Entry, write_report
from fewstep.files import atomic_path

NOTE = (
    "± of the distance joins the spread of training over seeds and the sampling error of the mean: "
    "error² = spread² / seeds + sampling². With one seed the spread is unknown and ± is the sampling error alone. "
    "All students were sampled from the same noise and classes, so differences from the best are paired: what "
    "sampling does to both cancels in their error."
)


@dataclass
class Scored:
    """One student at one number of steps: a row of a run's result and its samples' influence on the distance.

    influence (N,) and curvature (pairs,) are those of `FrechetResult`, None for other metrics.
    """

    row: Mapping[str, Any]
    influence: np.ndarray | None = None
    curvature: np.ndarray | None = None
    images: torch.Tensor | None = None
    latency: tuple[Latency, ...] = ()


@dataclass
class Ranked:
    """A recipe at one number of steps, over its seeds. Numbers of a run (seconds, ...) are means over seeds."""

    recipe: str
    method: str
    steps: int
    calls: int
    metric: str
    samples: int
    values: list[float]
    value: float
    error: float | None
    spread: float | None
    sampling_error: float | None
    accuracy: float | None
    diversity: float | None
    seconds_per_1000: float
    updates: int
    seconds: float
    cpu_seconds: float
    network_calls: int
    peak_memory_mib: float
    rank: int = 0
    difference: float | None = None
    difference_error: float | None = None
    influence: np.ndarray | None = field(default=None, repr=False)
    curvature: np.ndarray | None = field(default=None, repr=False)

    def as_json(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("influence", "curvature")}


def join(recipe: str, method: str, runs: Sequence[Mapping[str, Any]], scored: Sequence[Scored]) -> Ranked:
    """One row of several seeds: `runs` are their results, `scored` their measurements at one number of steps."""
    rows = [s.row for s in scored]
    values = [float(r["value"]) for r in rows]
    n = len(values)
    spread = float(np.std(values, ddof=1)) if n > 1 else None
    influence, curvature = _mean([s.influence for s in scored]), _mean([s.curvature for s in scored])
    sampling = None if influence is None or curvature is None else standard_error(influence, curvature)
    error = None
    if sampling is not None or spread is not None:
        error = math.sqrt((sampling or 0.0) ** 2 + (spread or 0.0) ** 2 / n)
    return Ranked(
        recipe,
        method,
        int(rows[0]["steps"]),
        int(rows[0]["calls"]),
        str(rows[0]["metric"]),
        int(rows[0]["samples"]),
        values,
        float(np.mean(values)),
        error,
        spread,
        sampling,
        _average([r["accuracy"] for r in rows]),
        _average([r["diversity"] for r in rows]),
        float(np.mean([r["seconds_per_1000"] for r in rows])),
        round(np.mean([r["updates"] for r in runs])),
        float(np.mean([r["seconds"] for r in runs])),
        float(np.mean([r["cpu_seconds"] for r in runs])),
        round(np.mean([r["network_calls"] for r in runs])),
        float(np.max([r["peak_memory_mib"] for r in runs])),
        influence=influence,
        curvature=curvature,
    )


def rank(rows: Sequence[Ranked]) -> list[Ranked]:
    """Sort by the distance and set each row's rank and paired difference from the best."""
    ordered = sorted(rows, key=lambda r: r.value)
    for number, row in enumerate(ordered, 1):
        row.rank = number
        if number > 1:
            row.difference, row.difference_error = difference(row, ordered[0])
    return ordered


def difference(a: Ranked, b: Ranked) -> tuple[float, float | None]:
    """value(a) - value(b) and its error: paired over samples, independent over training seeds."""
    variances = [r.spread**2 / len(r.values) for r in (a, b) if r.spread is not None]
    paired = a.influence is not None and b.influence is not None and len(a.influence) == len(b.influence)
    if paired:
        sampling = standard_error(a.influence - b.influence, a.curvature - b.curvature)  # type: ignore[operator]
        variances.append(sampling**2)
    return a.value - b.value, math.sqrt(sum(variances)) if variances else None


def _mean(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [p for p in parts if p is not None]
    return np.mean(known, axis=0) if known and len(known) == len(parts) else None


def _average(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def markdown(
    title: str, about: Mapping[str, Any], rows: Sequence[Ranked], teachers: Sequence[Mapping[str, Any]],
    failed: Sequence[Mapping[str, Any]],
) -> str:  # fmt: skip
    """The comparison as a Markdown page."""
    metric = rows[0].metric if rows else str(about["evaluation"]["metric"])
    classes = any(r.accuracy is not None for r in rows)
    head = ["rank", "recipe", "method", "calls", f"{metric} ±", "spread over seeds", "from the best"]
    head += ["accuracy", "diversity"] if classes else []
    head += ["updates", "training s", "CPU s", "network calls", "peak MiB", "s / 1000"]
    lines = [f"# {title}", "", _facts(about), "", _cells(head), _cells(["---"] * len(head))]
    for r in rows:
        cells = [str(r.rank), f"`{r.recipe}`", r.method, str(r.calls), with_error(r.value, r.error)]
        cells += ["" if r.spread is None else f"{r.spread:.2g} ({len(r.values)})"]
        cells += ["" if r.difference is None else with_error(r.difference, r.difference_error, "+")]
        cells += [share(r.accuracy), "" if r.diversity is None else f"{r.diversity:.2f}"] if classes else []
        cells += [str(r.updates), f"{r.seconds:.0f}", f"{r.cpu_seconds:.0f}"]
        cells += [f"{r.network_calls:.3g}", f"{r.peak_memory_mib:.0f}"]
        lines.append(_cells([*cells, f"{r.seconds_per_1000:.2f}"]))
    for t in teachers:
        cells = ["", t["title"], "", str(t["calls"]), with_error(t["value"], t["error"]), "", ""]
        cells += (
            [share(t["accuracy"]), f"{t['diversity']:.2f}"] if classes and t["accuracy"] is not None else []
        )
        cells += [""] * (len(head) - len(cells) - 1)
        lines.append(_cells([*cells, f"{t['seconds_per_1000']:.2f}"]))
    lines += ["", NOTE]
    if failed:
        lines += ["", "## Failed", ""]
        lines += [f"- `{f['recipe']}`, seed {f['seed']}: {f['message'].splitlines()[0]}" for f in failed]
    return "\n".join(lines) + "\n"


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """`1.28 ± 0.34`, the value with as many decimals as its error."""
    if error is None:
        return f"{value:{sign}.4g}"
    decimals = min(6, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else 3
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"


def share(value: float | None) -> str:
    """A share in [0, 1] as per cent."""
    return "" if value is None else f"{100 * value:.1f} %"


def _facts(about: Mapping[str, Any]) -> str:
    e = about["evaluation"]
    settings = f" Settings: `{' '.join(about['settings'])}`." if about["settings"] else ""
    return (
        f"Budget {about['budget']}, seeds {', '.join(map(str, about['seeds']))}; {e['samples']} samples of seed "
        f"{e['seed']} each. Commit {about['environment']['commit'][:12]}, {about['environment']['device']}, "
        f"{about['environment']['threads']} threads.{settings}"
    )


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def page(
    folder: Path, title: str, about: Mapping[str, Any], rows: Sequence[Ranked],
    shown: Mapping[tuple[str, int], Scored], teachers: Sequence[tuple[Mapping[str, Any], torch.Tensor | None]],
    failed: Sequence[Mapping[str, Any]],
) -> Path:  # fmt: skip
    """The comparison as one HTML file by fewstep.eval.report; `shown` gives each row's samples and latencies."""
    facts = {"evaluation": dict(about["evaluation"])}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def entry(
        name: str, steps: int, row: Mapping[str, Any], more: Mapping[str, Any], scored: Scored
    ) -> Entry:
        metrics: dict[str, Any] = {row["metric"]: {"value": row["value"], "standard_error": row["error"]}}
        metrics |= {k: {"value": v} for k, v in more.items() if v is not None}
        evaluation = Evaluation(
            name,
            about["evaluation"]["metric"],
            digest,
            row["metric"],
            row["samples"],
            metrics,
            dict(about["environment"]),
            row["seconds_per_1000"],
            row["calls"],
        )
        return Entry(evaluation, steps, name, scored.images, scored.latency)

    entries = []
    for r in rows:
        more = {
            "spread over seeds": r.spread,
            "class accuracy": r.accuracy,
            "diversity": r.diversity,
            "updates": float(r.updates),
            "training seconds": r.seconds,
            "training CPU seconds": r.cpu_seconds,
            "training network calls": float(r.network_calls),
        }
        entries.append(entry(r.recipe, r.calls, r.as_json(), more, shown[r.recipe, r.steps]))
    for t, images in teachers:
        more = {"class accuracy": t["accuracy"], "diversity": t["diversity"]}
        entries.append(entry(t["title"], t["calls"], t, more, Scored(t, images=images)))
    notes = [_facts(about).replace("`", ""), NOTE]
    notes += [f"{f['recipe']}, seed {f['seed']}, failed: {f['message']}" for f in failed]
    return write_report(entries, folder, title, notes=notes)


def write(
    folder: Path, title: str, about: Mapping[str, Any], rows: Sequence[Ranked],
    shown: Mapping[tuple[str, int], Scored], teachers: Sequence[tuple[Mapping[str, Any], torch.Tensor | None]],
    failed: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]],
) -> None:  # fmt: skip
    """results.json, report.md and report.html in `folder`."""
    content = {
        **about,
        "rows": [r.as_json() for r in rows],
        "teachers": [t for t, _ in teachers],
        "failed": list(failed),
        "runs": list(runs),
    }
    with atomic_path(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    with atomic_path(folder / "report.md") as temporary:
        temporary.write_text(markdown(title, about, rows, [t for t, _ in teachers], failed))
    if rows:
        page(folder, title, about, rows, shown, teachers, failed)


def facts(budget: Any, seeds: Sequence[int], settings: Sequence[str], evaluation: Any) -> dict[str, Any]:
    """What holds for every row."""
    wanted = {k: v for k, v in asdict(evaluation).items() if k != "teacher_steps"}
    return {
        "budget": str(budget),
        "seeds": list(seeds),
        "settings": list(settings),
        "evaluation": wanted,
        "environment": environment(),
    }
