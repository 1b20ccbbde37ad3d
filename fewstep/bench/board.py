"""The leaderboard: what recipes reach at their own budgets, in groups of what they need, beside their teacher.

    python -m fewstep.bench.board digits digits-dmd2 digits-sid [--seeds 3] [--points 8] [--work runs/board]
    python -m fewstep.bench.board digits --take runs/mine/results.json     # a comparison at `--budget own` made before

Each recipe is a comparison of its own (`fewstep compare RECIPE --budget own`), so that a row can be made again alone; it
stands in assets/board-NAME.json in place of that recipe's earlier ones. Nothing else may run on the machine: seconds
taken beside a training are no seconds of the recipe.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fewstep.commands.compare import curve
from fewstep.commands.compare.compare import compare
from fewstep.commands.compare.ranking import by_class
from fewstep.commands.report import with_error
from fewstep.config import UserError
from fewstep.eval.protocol.evaluation import Evaluation, distance_of
from fewstep.files import atomic_path, read_json
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load

OWN = "the recipe's own updates"
GROUPS = ("the teacher alone", "the teacher and data", "data; the teacher at most as a start")


@dataclass(frozen=True)
class Board:
    """Whose recipes it ranks, and by what."""

    prefix: str
    metric: str
    """That of the recipes that belong on it."""
    preset: str
    """That of its rows, with more samples."""
    samples: int


BOARDS = {
    "digits": Board("digits-", "fd-house-digits", "digits", 5000),
    "fashion": Board("fashion-", "fd-house-fashion-mnist", "fashion-mnist", 10000),
    "toy": Board("toy/", "energy", "energy", 4000),
}


def group_of(recipe: Recipe) -> str:
    """What the stages that distil need, as rows are grouped; a stage that trains a teacher's own loss is none of them.

    >>> fewstep.bench.board.group_of(fewstep.load_recipe("digits-kd"))
    'the teacher alone'
    """
    methods = [m for stage in recipe.stages() if (m := stage.method).name != "denoise"] or [recipe.method]
    needs = [m.needs() for m in methods]
    asked = set().union(*(n.roles & n.frozen for n in needs)) - {"target", "stage1"}  # copies of the student
    if not asked and getattr(recipe.discriminator, "trunk", "") != "teacher":
        return GROUPS[2]
    return GROUPS[1] if any(n.data for n in needs) else GROUPS[0]


def ranked(board: Board) -> list[str]:
    """Shipped recipes that have a row, or could have one: students of the data's own distribution, by its metric."""
    found = []
    for name in shipped():
        if name.startswith(board.prefix):
            recipe = load(name)
            alike = recipe.evaluate is not None and recipe.evaluate.metric == board.metric
            if alike and recipe.teacher is not None and "reward" not in recipe.roles:
                found.append(name)
    return found


def taken(file: Path, results: Path) -> dict[str, Any]:
    """Put the rows of a comparison at the recipes' own budgets into a board's file; returns the board.

    Raises UserError for another budget, for changed settings other than the evaluation's, and for another protocol than
    that of the rows that are there.
    """
    told = read_json(results)
    if told.get("budget") != OWN:
        raise UserError(f"{results}: is a comparison under {told.get('budget')}; a board takes --budget own")
    other = [s for s in told["settings"] if not s.startswith("evaluate.")]
    if other:
        raise UserError(f"{results}: changes the recipes ({', '.join(other)}); a board has them as they ship")
    board = read_json(file) if file.exists() else {"preset_hash": "", "rows": [], "teachers": []}
    hashes = {r["preset_hash"] for r in (*told["rows"], *told["teachers"])}
    if board["preset_hash"] and hashes != {board["preset_hash"]}:
        raise UserError(f"{results}: is measured by {', '.join(hashes)}, the rows of {file} by {board['preset_hash']}")
    env = told["environment"]
    about = {"commit": env["commit"][:7], "torch": env["torch"], "device": env["device"], "threads": env["threads"]}
    curves: dict[str, list[Any]] = {}
    for r in told["runs"]:
        curves.setdefault(r["recipe"], []).append(r.get("curve") or [])
    new = [_bare(r) | about | {"curves": curves.get(r["group"], [])} for r in told["rows"]]
    replaced = {r["group"] for r in new}
    names = {(r["name"], r["calls"]) for r in told["teachers"]}
    rows = [*(r for r in board["rows"] if r["group"] not in replaced), *new]
    teachers = [r for r in board["teachers"] if (r["name"], r["calls"]) not in names]
    teachers += [_bare(r) | about for r in told["teachers"]]
    content = {
        "preset_hash": next(iter(hashes)),
        "rows": sorted(rows, key=lambda r: (r["group"], r["steps"])),
        "teachers": sorted(teachers, key=lambda r: (r["name"].partition(",")[0], r["calls"])),
    }
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content


def _bare(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its place in its comparison."""
    return {k: v for k, v in row.items() if k not in ("rank", "difference")}


def table(board: Board, content: Mapping[str, Any]) -> str:
    """Rows in their groups, best first, the teachers after them, and the recipes that have no row."""
    head = [
        "recipe",
        "method",
        "calls",
        "FD ±",
        "seeds",
        "accuracy",
        "diversity",
        "recall",
        "s / 1000",
        "updates",
        "core-s",
    ]
    head += ["core-s to within 5 % of its end", "peak MiB", "commit"]
    lines = []
    for group in GROUPS:
        rows = [r for r in content["rows"] if group_of(load(r["group"])) == group]
        if rows:
            lines += [f"**What needs {group}**", "", _line(head), _line(["---"] * len(head))]
            lines += [_line(_cells(r)) for r in sorted(rows, key=lambda r: _evaluation(r).distance.value)] + [""]
    lines += ["**The teacher without training**, plain and with a fitted sampler", ""]
    lines += [_line(head[:9]), _line(["---"] * 9), *(_line(_cells(r)[:9]) for r in content["teachers"])]
    missing = sorted(set(ranked(board)) - {r["group"] for r in content["rows"]})
    if missing:
        lines += ["", "Not run: " + ", ".join(f"`{name}`" for name in missing) + "."]
    env = sorted({f"{r['device']}, threads: {r['threads']}, torch {r['torch']}" for r in content["rows"]})
    told = f"{board.samples:,} samples, preset `{board.preset}`"
    lines += ["", f"Each at its recipe's own updates; {told}; {'; '.join(env)}."]
    return "\n".join(lines)


def _evaluation(row: Mapping[str, Any]) -> Evaluation:
    own = ("commit", "torch", "device", "threads", "curves")
    return Evaluation.from_json({k: v for k, v in row.items() if k not in own})


def _cells(row: Mapping[str, Any]) -> list[str]:
    e = _evaluation(row)
    t = e.training
    recall = e.value("recall")
    student = "curves" in row
    seeds = len(e.metrics[str(distance_of(e))]["values"]) if student else ""
    cells = [f"`{e.name}`" if student else e.name, t.get("method", "") if student else "", str(e.calls)]
    cells += [with_error(e.distance), str(seeds), *by_class(e), "" if recall is None else f"{recall:.3f}"]
    cells.append("" if e.seconds is None else f"{e.seconds:.2f}")
    if student:
        settled = t.get("settled_cpu_seconds")
        cells += [f"{t['updates']:,}", f"{t['cpu_seconds']:.0f}", "" if settled is None else f"{settled:.0f}"]
        cells += [f"{t['peak_memory_mib']:.0f}", row["commit"]]
    return cells


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(content: Mapping[str, Any], path: Path) -> bool:
    """One line a run, one colour a recipe; whether there was a curve to draw."""
    lines = {r["group"]: r["curves"] for r in content["rows"]}
    first = next(iter(content["rows"]), None)
    return curve.save(lines, str(distance_of(_evaluation(first))) if first else "", path)


def assets() -> Path:
    return Path(str(files("fewstep.assets")))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.bench.board", description=__doc__)
    parser.add_argument("board", choices=BOARDS)
    parser.add_argument("recipes", nargs="*", help="recipes to measure, each alone")
    parser.add_argument("--take", type=Path, nargs="*", default=[], help="results.json of comparisons made before")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--points", type=int, default=8, help="measurements along a run")
    parser.add_argument("--work", type=Path, default=Path("runs/board"), help="folder of the comparisons")
    parser.add_argument("--out", type=Path, default=None, help="folder of board-NAME.json; the assets when left out")
    given = parser.parse_args(argv)
    board, out = BOARDS[given.board], given.out or assets()
    file = out / f"board-{given.board}.json"
    results = list(given.take)
    for name in given.recipes:
        if name not in ranked(board):
            raise UserError(
                f"{name}: has no place on the board {given.board}; those that have: {', '.join(ranked(board))}"
            )
    for name in given.recipes:
        folder = given.work / name.replace("/", "-")
        settings = [f"evaluate.metric={board.preset}"]
        resume = (folder / "compare.json").exists()
        results.append(compare([name], "own", given.seeds, folder, resume, settings, (), board.samples, given.points))
    for path in results:
        draw(taken(file, path), out / f"board-{given.board}.png")
    if not results:
        raise UserError("name recipes to measure, or results with --take")
    print(table(board, read_json(file)))


if __name__ == "__main__":
    main()
