"""The leaderboard: what recipes reach at their own budgets, in groups of what they need, beside their teacher.

    python -m fewstep.bench.board digits digits-dmd2 digits-sid [--seeds 3] [--points 4] [--fitted] [--work runs/board]
    python -m fewstep.bench.board digits --take runs/mine/results.json     # a comparison at `--budget own` made before
    python -m fewstep.bench.board digits --pace digits-dmd2                # seconds of a row that was made with --busy

Each recipe is a comparison of its own (`fewstep compare RECIPE --budget own`), so that a row can be made again alone; it
stands in assets/board-NAME.json in place of that recipe's earlier ones. Seconds taken beside a training are no seconds of
the recipe: nothing else may run on the machine, or `--busy` says that something did. The rows are then without seconds
until `--pace` has timed some updates of their recipes, and samples of student and teacher, at rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.bench.board_table import NOTES, draw, table
from fewstep.bench.boards import BOARDS, Board, digest_of, is_guided, ranked, settings_of
from fewstep.bench.pace import pace
from fewstep.commands.compare.budget import Budget
from fewstep.commands.compare.compare import compare
from fewstep.commands.compare.kept import of_students, write_json
from fewstep.commands.compare.one_run import NEVER
from fewstep.commands.judge import preset_of
from fewstep.commands.record import teacher_as_it_is
from fewstep.config import UserError
from fewstep.eval.protocol.evaluation import environment
from fewstep.files import dirty, expanded, read_json
from fewstep.recipe.schema import Evaluate
from fewstep.recipe.store import load

OWN = str(Budget.parse("own"))
MACHINE = ("device", "machine", "threads", "torch")
"""What of the environment must be alike for seconds and memory to stand in one column."""


def taken(board: Board, file: Path, results: Path, busy: bool = False) -> dict[str, Any]:
    """Put the rows of a comparison at the recipes' own budgets into a board's file; returns the board.

    busy: other work ran beside it, so that none of its seconds is shown.

    Raises UserError, and writes nothing, for what is no comparison of shipped recipes as they are by the board's preset,
    for runs of several commits or of a changed checkout, and for another machine or teacher than that of the rows there.
    A teacher has rows by recipes that leave it in its own process.
    """
    told = read_json(results)
    refuse(board, told, results)
    new = [_with_runs(row, told, results) | {"busy": busy} for row in told["rows"]]
    held = read_json(file) if file.exists() else {"rows": [], "teachers": [], "failed": []}
    machine = {k: v for k, v in told["environment"].items() if k in MACHINE}
    if held["rows"] and machine != held["machine"]:
        told_apart = f"is of {machine}, the rows of {file.name} are of {held['machine']}"
        raise UserError(f"{results}: {told_apart}; a board is of one machine")
    names = {r["group"] for r in new}
    kept = [r for r in held["rows"] if r["group"] not in names]
    weights = {t["path"]: t["sha256"] for r in kept if (t := r["teacher"])}
    for r in new:
        if (t := r["teacher"]) and weights.get(t["path"], t["sha256"]) != t["sha256"]:
            raise UserError(f"{results}: {r['group']} had other weights as its teacher than the rows of {file.name}")
    # In another process as many steps lie at other levels, so that such a teacher's rows are none of this board's.
    own = teacher_as_it_is(names | {f["recipe"] for f in told["failed"]})
    teachers = [_bare(r) | {"busy": busy} for r in told["teachers"] if own]
    before = _weights(held["rows"])
    if names and before and before.isdisjoint(_weights(new)):
        held["teachers"] = []  # all rows were replaced, by ones of another teacher
    still = {(r["name"], r["calls"]) for r in held["teachers"] if busy and (not r.get("busy") or "pace" in r)}
    teachers = [r for r in teachers if (r["name"], r["calls"]) not in still]  # those there have seconds
    replaced = {(r["name"], r["calls"]) for r in teachers}
    failed = [f for f in held["failed"] if f["recipe"] not in names | {f["recipe"] for f in told["failed"]}]
    content = {
        "machine": machine,
        "rows": sorted([*kept, *new], key=lambda r: (r["group"], r["steps"])),
        "teachers": sorted(
            [*(r for r in held["teachers"] if (r["name"], r["calls"]) not in replaced), *teachers],
            key=lambda r: (r["name"].partition(",")[0], r["calls"]),
        ),
        "failed": [*failed, *({"recipe": f["recipe"], "seed": f["seed"]} for f in told["failed"])],
    }
    write_json(file, content)
    return content


def _weights(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Digests of the teachers that rows were distilled from."""
    return {r["teacher"]["sha256"] for r in rows if r["teacher"]}


def unpaced(file: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a recipe that lack seconds.

    Raises UserError where there are none, where they are of another recipe than ships today, or of another machine.
    """
    content: dict[str, Any] = read_json(file) if file.exists() else {"rows": []}
    rows = [r for r in content["rows"] if r["group"] == name]
    if not any(r.get("busy") for r in rows):
        told = "its row has seconds, taken at rest" if rows else f"has no row in {file}; make it first"
        raise UserError(f"--pace {name}: {told}")
    if any(r["identity"] != digest_of(name) for r in rows):
        raise UserError(f"--pace {name}: its row is of an earlier recipe; make it again")
    here = {k: v for k, v in environment().items() if k in MACHINE}
    if here != content["machine"]:
        raise UserError(
            f"--pace {name}: here is {here}, {file.name} is of {content['machine']}; a board is of one machine"
        )
    return rows


def paced(file: Path, name: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Give a recipe's rows that were made beside other work their seconds, `told` by `pace`; returns the board.

    And the teacher's rows theirs.
    """
    content: dict[str, Any] = read_json(file)
    own = {k: v for k, v in told.items() if k != "teachers"}
    for r in content["rows"]:
        if r["group"] == name and r.get("busy"):
            r["pace"] = own
    for r in content["teachers"]:
        if (seconds := told["teachers"].get(r["name"])) is not None:
            r["pace"] = {"seconds": {str(r["steps"]): seconds}, "commit": told["commit"]}
    write_json(file, content)
    return content


def waiting(file: Path) -> list[tuple[str, int]]:
    """(name, steps) of the teacher's rows without seconds."""
    return [(r["name"], r["steps"]) for r in read_json(file)["teachers"] if r.get("busy") and "pace" not in r]


def was_busy(results: Path) -> Path:
    """A file beside a comparison's folder: other work ran beside it."""
    return results.parent.with_name(f"{results.parent.name}.busy")


def _with_runs(row: Mapping[str, Any], told: Mapping[str, Any], results: Path) -> dict[str, Any]:
    """A row with what its runs say of themselves: their commit, curves, interruptions, and the recipe's digest."""
    runs = [r for r in told["runs"] if r["recipe"] == row["group"]]
    try:
        commits, digests = {r["commit"] for r in runs}, {r["identity"] for r in runs}
        resumes, teacher = sum(r["resumes"] for r in runs), runs[0]["teacher"]
    except KeyError as error:
        raise UserError(f"{results}: its runs do not tell their {error.args[0]}; compare again") from None
    if len(commits) != 1 or len(digests) != 1:
        raise UserError(f"{results}: the runs of {row['group']} are of several commits or recipes; train them together")
    commit = commits.pop()
    if commit.endswith("-dirty"):
        raise UserError(f"{results}: {row['group']} was trained in a changed checkout of {commit[:7]}; commit first")
    about = {"commit": commit[:7], "identity": digests.pop(), "resumes": resumes, "teacher": teacher}
    about |= {"seeds_asked": len(told["seeds"]), "guided": is_guided(load(row["group"]))}
    return _bare(row) | about | {"curves": [r.get("curve") or [] for r in runs]}


def refuse(board: Board, told: Mapping[str, Any], results: Path) -> None:
    """UserError for rows that have no place on the board."""
    if told.get("budget") != OWN:
        raise UserError(f"{results}: is a comparison under {told.get('budget')}; a board takes --budget own")
    if of_students(told["settings"]) not in ([], settings_of(board)):
        raise UserError(f"{results}: changes the recipes ({', '.join(told['settings'])}); a board has them as they ship")
    protocol, places = preset_of(Evaluate(metric=board.preset, samples=board.samples)), ranked(board)
    for row in [*told["rows"], *told["teachers"]]:
        if row["preset_hash"] != protocol.hash:
            raise UserError(
                f"{results}: {row['name']} is measured by {row['preset']} with {row['number']:,} samples; this board "
                f"takes {board.preset} with {board.samples:,}"
            )
    for row in told["rows"]:
        if row["group"] not in places:
            raise UserError(f"{results}: {row['group']} has no place on this board; those that have: {', '.join(places)}")


def _bare(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its place in its comparison."""
    return {k: v for k, v in row.items() if k not in ("rank", "difference")}


def assets() -> Path:
    return expanded("assets:")


def measured(
    board: Board, name: str, seeds: int, points: int, work: Path, resume: bool, busy: bool, fitted: bool = False
) -> Path:
    """results.json of a recipe's own comparison; what was ever busy stays so when it is resumed.

    fitted: measure the teacher under a sampler fitted for as many calls too, whatever that costs.
    """
    folder = work / name.replace("/", "-")
    mark = was_busy(folder / "results.json")
    if resume or not folder.exists():  # otherwise what is there is refused, and keeps its mark
        if not resume:
            mark.unlink(missing_ok=True)
        if busy:
            work.mkdir(parents=True, exist_ok=True)
            mark.touch()
    settings = [*settings_of(board), *["evaluate.fitted=true"] * fitted]
    return compare([name], "own", seeds, folder, resume, settings, (), board.samples, points)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.bench.board", description=__doc__)
    parser.add_argument("board", choices=BOARDS)
    parser.add_argument("recipes", nargs="*", help="recipes to measure, each alone")
    parser.add_argument("--take", type=Path, nargs="*", default=[], help="results.json of comparisons made before")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--points", type=int, default=4, help="measurements along a run's last stage")
    parser.add_argument(
        "--busy", action="store_true", help="other work ran or runs beside these: show none of their seconds"
    )
    parser.add_argument("--fitted", action="store_true", help="and the teacher under a sampler fitted for as many calls")
    parser.add_argument(
        "--pace", nargs="*", default=[], help="recipes whose busy rows, and the teacher's, get seconds, timed now"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/board"), help="folder of the comparisons")
    parser.add_argument("--resume", action="store_true", help="continue comparisons that were interrupted")
    parser.add_argument("--out", type=Path, default=None, help="folder of board-NAME.json; the assets when left out")
    given = parser.parse_args(argv)
    board, out = BOARDS[given.board], given.out or assets()
    file, picture = out / f"board-{given.board}.json", out / f"board-{given.board}.png"
    places = ranked(board)
    for name in (*given.recipes, *given.pace):
        if name not in places:
            raise UserError(f"{name}: has no place on the board {given.board}; those that have: {', '.join(places)}")
    if not given.recipes and not given.take and not given.pace:
        raise UserError("name recipes to measure, results with --take, or rows with --pace")
    if given.fitted and not given.recipes:
        raise UserError("--fitted: is for recipes that are measured now; name them")
    other = [name for name in given.recipes if given.fitted and not teacher_as_it_is([name])]
    if other:
        raise UserError(f"--fitted: {other[0]} has its teacher in another process, which has no row on this board")
    if given.pace and (given.busy or given.recipes or given.take):
        raise UserError("--pace: times rows that are there, on a machine at rest; give it alone")
    if (given.recipes or given.pace) and dirty():
        raise UserError("the checkout has changes, so no commit tells what is measured; commit them first")
    for path in given.take:
        draw(board, taken(board, file, path, given.busy or was_busy(path).exists()), picture)
    steps = {name: [r["steps"] for r in unpaced(file, name)] for name in given.pace}
    for name, counts in steps.items():
        timed = pace(load(name, [*settings_of(board), *NEVER]), counts, waiting(file) if teacher_as_it_is([name]) else [])
        draw(board, paced(file, name, timed), picture)
    wrong = []
    for name in given.recipes:
        try:
            path = measured(board, name, given.seeds, given.points, given.work, given.resume, given.busy, given.fitted)
            draw(board, taken(board, file, path, was_busy(path).exists()), picture)
        except UserError as error:  # the others are measured all the same
            wrong.append(f"{name}: {error}")
    if file.exists():
        print(f"{table(board, read_json(file))}\n\n{NOTES}")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
