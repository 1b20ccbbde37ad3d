"""A leaderboard as its page shows it: tables by group, what they are of, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.bench.boards import GROUPS, Board, digest_of, group_of, ranked
from fewstep.commands.compare import curve
from fewstep.commands.compare.kept import evaluation_of
from fewstep.commands.compare.ranking import by_class, cells_line
from fewstep.commands.report import with_error
from fewstep.eval.protocol.evaluation import distance_of
from fewstep.recipe.store import load


def table(board: Board, content: Mapping[str, Any]) -> str:
    """Rows in their groups, best first, the teachers after them, and the recipes that have no row."""
    rows, known = current(board, content["rows"]), set(ranked(board))
    stale = sorted({r["group"] for r in content["rows"]} - {r["group"] for r in rows})
    every = [*rows, *content["teachers"]]
    name = str(distance_of(evaluation_of(every[0]))).partition(" (")[0] if every else "FD"
    erring = any(evaluation_of(r).distance.standard_error for r in every)
    head = ["recipe", "method", "calls", name + " ±" * erring, "seeds", "accuracy", "diversity", "recall", "s / 1000"]
    beside = len(head)
    head += ["updates", "core-s", "core-s to within 5 % of its end", "peak MiB", "commit"]
    lines = []
    for group in GROUPS:
        own = [r for r in rows if group_of(load(r["group"])) == group]
        if own:
            own = sorted(own, key=lambda r: evaluation_of(r).distance.value)
            lines += [f"**What needs {group}**", "", *filled(head, [_cells(r) for r in own]), ""]
    lines += ["**The teacher without training**", ""]
    lines += [*filled(head[:beside], [_cells(r)[:beside] for r in content["teachers"]]), ""]
    if content["teachers"] and content["rows"] and not any(r["training"] for r in content["teachers"]):
        few = all(r["steps"] == 1 for r in content["rows"])
        told = "none, as one call leaves nothing to fit" if few else "not run"
        lines += [f"With a sampler fitted for as few calls: {told}.", ""]
    failed = sorted({f["recipe"] for f in content["failed"]} - {r["group"] for r in rows})
    missing = sorted(known - {r["group"] for r in rows} - set(failed) - set(stale))
    for told, names in (("Failed", failed), ("Of an earlier recipe, to be made again", stale), ("Not run", missing)):
        if names:
            lines += [f"{told}: " + ", ".join(f"`{n}`" for n in names) + ".", ""]
    if every:
        machine = ", ".join(f"{k} {v}" for k, v in content["machine"].items())
        lines += [f"Each at its recipe's own updates; {board.samples:,} samples, preset `{board.preset}`; {machine}."]
        lines += _of_chance(content["teachers"])
    return "\n".join(lines).rstrip()


NOTES = """\
- s / 1000: seconds for a thousand samples. ≈: timed over a few updates at rest, without checkpoints, of a training that
  had other work beside it; good to a fifth. A dash: no time at rest was taken.
- Interrupted: the training went on from a checkpoint; without ≈ its seconds leave out those lost after it. Seeds 2 of 3:
  one failed.
- Core-s to within 5 % of its end: when the distance had settled, by the points of its curve.
- Peak: memory of the training process, on a CPU up to its first measurement.
- Guided: aims at a guided distribution, which is not the data's."""
"""How the columns of all boards are to be read."""


def filled(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table without the columns that are empty in all of its rows."""
    kept = [i for i in range(len(head)) if not rows or any(r[i] for r in rows)]
    return [cells_line([r[i] for i in kept]) for r in (head, ["---"] * len(head), *rows)]


def _of_chance(teachers: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on how far from zero this many perfect samples are, as their nearest stand-in tells; none without."""
    told = [(e.distance.value, e.metrics[str(distance_of(e))].get("bias")) for e in map(evaluation_of, teachers)]
    bias = min((t for t in told if t[1] is not None), default=(0, None))[1]
    if bias is None:
        return []
    return [f"As many perfect samples would have a distance of about {bias:.2f}, for their number alone."]


def current(board: Board, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of recipes as they ship today."""
    known = ranked(board)
    return [r for r in rows if r["group"] in known and r["identity"] == digest_of(r["group"])]


def _cells(row: Mapping[str, Any]) -> list[str]:
    e = evaluation_of(row)
    t, student, seeds = e.training, "curves" in row, ""
    recall = e.value("recall")
    if student:
        had, asked = len(e.metrics[str(distance_of(e))]["values"]), row["seeds_asked"]
        seeds = f"{had} of {asked}" if had < asked else f"{had}"
    name = f"`{e.name}`" + " (guided)" * row["guided"] if student else e.name
    cells = [name, t.get("method", "") if student else "", str(e.calls)]
    cells += [with_error(e.distance), seeds, *by_class(e), "" if recall is None else f"{recall:.3f}"]
    busy, told = bool(row.get("busy")), row.get("pace")
    hidden = busy and not told
    drawn = told["seconds"].get(str(row["steps"])) if told else e.seconds
    cells.append("–" if hidden else _seconds(drawn, 2, busy))
    if student:
        slower = told["cpu_seconds"] / t["cpu_seconds"] if told else 1.0
        near = t.get("settled_cpu_seconds")
        whole = _seconds(t["cpu_seconds"] * slower, 0, busy)
        own = row["steps"] == len(load(row["group"]).sampler().steps)  # what a curve is of
        late = "its end" if own and all(row["curves"]) else ""
        seconds = [whole, late if near is None else _seconds(near * slower, 0, busy)]
        resumed = " (interrupted)" * (row["resumes"] > 0)
        cells += [f"{t['updates']:,}{resumed}", *(["–", "–"] if hidden else seconds)]
        cells += [f"{t['peak_memory_mib']:.0f}", row["commit"]]
    return cells


def _seconds(value: float | None, digits: int, busy: bool) -> str:
    return "" if value is None else "≈ " * busy + f"{value:.{digits}f}"


def lines(board: Board, content: Mapping[str, Any]) -> dict[str, list[list[dict[str, float]]]]:
    """The runs' points by recipe, at rest: those made beside other work end at what their training costs there.

    A row without seconds of its own has none, nor has one of an earlier recipe.
    """
    found = {}
    for r in current(board, content["rows"]):
        # Rows of before have points of the stages before the last one too.
        begun = sum(stage.steps for stage in load(r["group"]).stages()[:-1])
        curves = [[p for p in run if p["updates"] >= begun] for run in r["curves"]]
        if not r.get("busy"):
            found[r["group"]] = curves
        elif "pace" in r:
            rest = r["pace"]["cpu_seconds"]
            found[r["group"]] = [
                [p | {"cpu_seconds": p["cpu_seconds"] * rest / run[-1]["cpu_seconds"]} for p in run] for run in curves
            ]
    return found


def draw(board: Board, content: Mapping[str, Any], path: Path) -> bool:
    """One line a run, one colour a recipe; whether there was a curve to draw. An older picture without one goes."""
    first = next(iter(content["rows"]), None)
    drawn = curve.save(lines(board, content), str(distance_of(evaluation_of(first))) if first else "", path)
    if not drawn:
        path.unlink(missing_ok=True)
    return drawn
