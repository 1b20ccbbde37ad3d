"""What a comparison says: means over seeds with their errors, differences from the best, a table and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.commands.compare import curve
from fewstep.commands.report import with_error
from fewstep.eval.metrics.estimate import Estimate
from fewstep.eval.metrics.frechet import paired_difference, standard_error
from fewstep.eval.protocol.evaluation import Evaluation, distance_of, environment
from fewstep.eval.report import write_report
from fewstep.export.card import fenced, plain
from fewstep.files import atomic_path

NOTE = (
    "± of the distance joins the spread of training over seeds and the sampling error of the mean: "
    "error² = spread² / seeds + sampling². With one seed the spread is unknown and ± is the sampling error alone. "
    "All students were sampled from the same noise and classes, so differences from the best are paired: what "
    "sampling does to both cancels in their error."
)


CURVES = "curves.png"
SETTLED = "CPU s to within 5 % of its end"


def join(recipe: str, runs: Sequence[Mapping[str, Any]], evaluations: Sequence[Evaluation]) -> Evaluation:
    """A recipe at one number of steps: the mean of its seeds' `evaluations`, and of what its `runs` had cost.

    The distance's entry also has its values, their spread and the sampling error of the mean; `frechet` is the mean's
    influence per sample. Pictures and latency are the first seed's.
    """
    first = evaluations[0]
    distance = distance_of(first)
    assert distance is not None  # a comparison is ranked by one
    metrics: dict[str, dict[str, Any]] = {}
    for name in first.metrics:
        known = [v for e in evaluations if (v := e.metrics[name]["value"]) is not None]
        metrics[name] = {"value": float(np.mean(known)) if known else None}
    values = [float(e.metrics[distance]["value"]) for e in evaluations]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    mean = mean_influence(evaluations)
    sampling = None if mean is None else mean.standard_error
    error = None
    if sampling is not None or spread is not None:
        error = math.sqrt((sampling or 0.0) ** 2 + (spread or 0.0) ** 2 / len(values))
    metrics[distance] = {
        "value": float(np.mean(values)),
        "standard_error": error,
        "values": values,
        "spread": spread,
        "sampling_error": sampling,
    }
    seconds = [e.seconds for e in evaluations if e.seconds is not None]
    return replace(
        first,
        name=recipe,
        group=recipe,
        metrics=metrics,
        seconds=float(np.mean(seconds)) if seconds else None,
        training={
            "method": runs[0]["method"],
            "updates": round(np.mean([r["updates"] for r in runs])),
            "seconds": float(np.mean([r["seconds"] for r in runs])),
            "cpu_seconds": float(np.mean([r["cpu_seconds"] for r in runs])),
            "network_calls": round(np.mean([r["network_calls"] for r in runs])),
            "peak_memory_mib": float(np.max([r["peak_memory_mib"] for r in runs])),
            # The curve is of the recipe's own number of steps.
            "settled_cpu_seconds": mean_settled(runs) if first.steps == runs[0].get("own_steps", first.steps) else None,
        },
        frechet=[] if mean is None else [mean],
    )


def mean_settled(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean of `curve.settled` over runs; None where one has no curve, or moved until its end."""
    found = [curve.settled(r.get("curve") or ()) for r in runs]
    known = [f for f in found if f is not None]
    return float(np.mean(known)) if known and len(known) == len(found) else None


def mean_influence(evaluations: Sequence[Evaluation]) -> Estimate | None:
    """The mean distance with the mean influence of each sample on it; None where one does not know its own."""
    known = [e.frechet[0] for e in evaluations if e.frechet and e.frechet[0].influence is not None]
    if len(known) < len(evaluations):
        return None
    influence = np.mean(np.stack([k.influence for k in known]), axis=0)  # type: ignore[arg-type]
    curvature = np.mean(np.stack([k.curvature for k in known]), axis=0)  # type: ignore[arg-type]
    value = float(np.mean([k.value for k in known]))
    error = standard_error(influence, curvature)
    return Estimate(value=value, standard_error=error, influence=influence, curvature=curvature)


def rank(rows: Sequence[Evaluation]) -> list[tuple[Evaluation, Estimate | None]]:
    """Sorted by the distance, each with its paired difference from the best; None for the best itself."""
    ordered = sorted(rows, key=lambda e: e.distance.value)
    return [(e, None if i == 0 else difference(e, ordered[0])) for i, e in enumerate(ordered)]


def difference(a: Evaluation, b: Evaluation) -> Estimate:
    """distance(a) - distance(b): its error is paired over samples, independent over training seeds."""
    variances = []
    for e in (a, b):
        entry = e.metrics[str(distance_of(e))]
        if entry["spread"] is not None:
            variances.append(entry["spread"] ** 2 / len(entry["values"]))
    one, other = (e.frechet[0] if e.frechet else None for e in (a, b))
    if one is not None and other is not None and len(one.influence) == len(other.influence):  # type: ignore[arg-type]
        variances.append(paired_difference(one, other).standard_error ** 2)  # type: ignore[operator]
    error = math.sqrt(sum(variances)) if variances else None
    return Estimate(value=a.distance.value - b.distance.value, standard_error=error)


def markdown(
    title: str, about: Mapping[str, Any], ranked: Sequence[tuple[Evaluation, Estimate | None]],
    teachers: Sequence[Evaluation], failed: Sequence[Mapping[str, Any]], drawn: bool = False,
) -> str:  # fmt: skip
    """The comparison as a Markdown page. drawn: there are curves beside it."""
    every = [*(e for e, _ in ranked), *teachers]
    metric = (distance_of(every[0]) if every else None) or str(about["evaluation"]["metric"])
    classes = any(e.value("class accuracy") is not None for e in every)
    head = ["rank", "recipe", "method", "calls", f"{plain(metric)} ±", "spread over seeds", "from the best"]
    head += ["accuracy", "diversity"] if classes else []
    curved = any(e.training.get("settled_cpu_seconds") is not None for e, _ in ranked)
    head += ["updates", "training s", "CPU s", *[SETTLED] * curved, "network calls", "peak MiB", "s / 1000"]
    lines = [f"# {plain(title)}", "", _facts(about), "", cells_line(head), cells_line(["---"] * len(head))]
    for number, (e, apart) in enumerate(ranked, 1):
        t, entry = e.training, e.metrics[metric]
        cells = [str(number), code(e.name), plain(t["method"]), str(e.calls), with_error(e.distance)]
        cells += ["" if entry["spread"] is None else f"{entry['spread']:.2g} ({len(entry['values'])})"]
        cells += [_apart(apart)]
        cells += [*by_class(e)] if classes else []
        cells += [f"{t['updates']:,}", f"{t['seconds']:.0f}", f"{t['cpu_seconds']:.0f}"]
        if curved:
            cells += ["" if t.get("settled_cpu_seconds") is None else f"{t['settled_cpu_seconds']:.0f}"]
        cells += [f"{t['network_calls']:,}", f"{t['peak_memory_mib']:.0f}"]
        lines.append(cells_line([*cells, "" if e.seconds is None else f"{e.seconds:.2f}"]))
    for e in teachers:
        cells = ["", plain(e.name), "", str(e.calls), with_error(e.distance), "", ""]
        cells += [*by_class(e)] if classes else []
        cells += [""] * (len(head) - len(cells) - 1)
        lines.append(cells_line([*cells, "" if e.seconds is None else f"{e.seconds:.2f}"]))
    lines += ["", NOTE]
    if drawn:
        lines += ["", f"![{plain(metric)} over processor seconds]({CURVES})"]
    if failed:
        lines += ["", "## Failed", ""]
        lines += [f"- {code(f['recipe'])}, seed {f['seed']}: {plain(f['message'].splitlines()[0])}" for f in failed]
    return "\n".join(lines) + "\n"


def by_class(e: Evaluation) -> tuple[str, str]:
    """Class accuracy as per cent and within-class diversity, empty where they are not known."""
    accuracy, diversity = e.value("class accuracy"), e.value("within-class diversity")
    return (
        "" if accuracy is None else f"{100 * accuracy:.1f} %",
        "" if diversity is None else f"{diversity:.2f}",
    )


def _facts(about: Mapping[str, Any]) -> str:
    e = about["evaluation"]
    settings = f" Settings: {code(' '.join(about['settings']))}." if about["settings"] else ""
    return (
        f"Budget {about['budget']}, seeds {', '.join(map(str, about['seeds']))}; {e['samples']} samples of seed "
        f"{e['seed']} each. Commit {about['environment']['commit'][:12]}, {about['environment']['device']}, "
        f"{about['environment']['threads']} threads.{settings}"
    )


def code(text: str) -> str:
    """Text in the letters of code; what would end them, or a cell, does not get there."""
    line = " ".join(text.split())
    mark = fenced(line, 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{mark}{space}{line.replace('|', chr(92) + '|')}{space}{mark}"


def cells_line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def page(
    folder: Path, title: str, about: Mapping[str, Any], ranked: Sequence[tuple[Evaluation, Estimate | None]],
    teachers: Sequence[Evaluation], failed: Sequence[Mapping[str, Any]],
) -> Path:  # fmt: skip
    """The comparison as one HTML file by fewstep.eval.report."""
    notes = [_facts(about).replace("`", ""), NOTE]
    notes += [f"{f['recipe']}, seed {f['seed']}, failed: {f['message']}" for f in failed]
    place = {id(e): (str(number), _apart(apart)) for number, (e, apart) in enumerate(ranked, 1)}
    columns = {
        "rank": lambda e: place.get(id(e), ("", ""))[0],
        "from the best, paired": lambda e: place.get(id(e), ("", ""))[1],
    }
    return write_report([*(e for e, _ in ranked), *teachers], folder, title, notes=notes, columns=columns)


def _apart(apart: Estimate | None) -> str:
    return "" if apart is None else with_error(apart, "+")


def write(
    folder: Path, title: str, about: Mapping[str, Any], ranked: Sequence[tuple[Evaluation, Estimate | None]],
    teachers: Sequence[Evaluation], failed: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]],
) -> None:  # fmt: skip
    """results.json, report.md, report.html and, where runs have curves, curves.png in `folder`."""
    content = {
        **about,
        "rows": [
            {**_row(e), "rank": number, "difference": None if apart is None else apart.as_dict()}
            for number, (e, apart) in enumerate(ranked, 1)
        ],
        "teachers": [_row(e) for e in teachers],
        "failed": list(failed),
        "runs": list(runs),
    }
    with atomic_path(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    lines: dict[str, list[Any]] = {}
    for r in runs:
        lines.setdefault(r["recipe"], []).append(r.get("curve") or ())
    metric = str(distance_of(ranked[0][0])) if ranked else ""
    drawn = curve.save(lines, metric, folder / CURVES)
    with atomic_path(folder / "report.md") as temporary:
        temporary.write_text(markdown(title, about, ranked, teachers, failed, drawn))
    if ranked:
        page(folder, title, about, ranked, teachers, failed)


def _row(e: Evaluation) -> dict[str, Any]:
    """An evaluation without its environment, which the comparison tells once."""
    return {key: value for key, value in e.as_json().items() if key != "environment"}


def facts(budget: Any, seeds: Sequence[int], settings: Sequence[str], evaluation: Any) -> dict[str, Any]:
    """What holds for every row."""
    wanted = {k: v for k, v in asdict(evaluation).items() if k not in ("teacher_steps", "fitted")}
    return {
        "budget": str(budget),
        "seeds": list(seeds),
        "settings": list(settings),
        "evaluation": wanted,
        "environment": environment(),
    }
