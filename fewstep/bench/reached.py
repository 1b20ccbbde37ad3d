"""What the shipped results were to reach, beside what they reached; a table of assets/README.md."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from math import hypot
from pathlib import Path
from typing import Any

from fewstep.bench import emoji
from fewstep.bench.board_table import current
from fewstep.bench.boards import BOARDS, GROUPS, Board, group_of, is_guided
from fewstep.commands.compare.kept import evaluation_of
from fewstep.commands.compare.ranking import cells_line
from fewstep.commands.record import resumed_of, shipped_as
from fewstep.commands.report import with_error
from fewstep.config import UserError
from fewstep.eval.metrics.estimate import Estimate
from fewstep.eval.protocol.evaluation import Evaluation, distance_of
from fewstep.files import read_json
from fewstep.recipe.store import load

NOT_RUN = "not run"
HELD_OUT = "compare-held-out.json"
"""Neither teacher nor student ever saw 400 digits; assets/README.md has the command."""


def table(folder: Path) -> str:
    """Of a folder such as the assets: each aim, and what the files there say of it."""
    lines = [cells_line(["what", "at least", "aim", "reached"]), cells_line(["---"] * 4)]
    lines.append(cells_line(["Fashion-MNIST teacher, FD, N = 10,000", "8", "5", teacher(folder)]))
    told = on_board(folder / "board-fashion.json", BOARDS["fashion"])
    lines.append(cells_line(["its best one-step student, FD over the teacher's", "1.1", "0.9", told]))
    file = folder / "emoji-teacher" / "relay.json"
    measured = read_json(file)["measured"] if file.exists() else []
    captions = [m["retrieval"] for m in measured if m.get("retrieval") is not None]
    told = f"{100 * max(captions):.0f} %" if captions else NOT_RUN
    lines.append(cells_line(["emoji teacher at its best, captions found", "97 %", "100 %", told]))
    what = "emoji one-step student, captions found; saturation against the teacher's"
    lines.append(cells_line([what, "90 %; ± 10 %", "97 %; ± 5 %", one_step_emoji(folder / "emoji.json")]))
    told = on_board(folder / "board-digits.json", BOARDS["digits"])
    what = "digits student over teacher, FD, N = 5,000, three seeds, against the 1,797 pictures of the training"
    lines.append(cells_line([what, "1.1", "1.0", told]))
    told = apart(folder / HELD_OUT)
    lines.append(cells_line(["the same of a pair trained on 1,397, against the 400 held out", "1.1", "1.0", told]))
    return "\n".join(lines)


def teacher(folder: Path) -> str:
    """The least distance of Fashion-MNIST's without guidance, as it was shipped or as its students' board has it."""
    file, board = folder / "fashion-teacher" / "relay.json", folder / "board-fashion.json"
    if not file.exists():
        return NOT_RUN
    told = read_json(file)
    kept = [m for m in told["measured"] if m["samples"] >= 10_000 and m["guidance"] == 1]
    found = [(2 * m["heun_steps"] - 1, Estimate(value=m["value"], standard_error=m["error"])) for m in kept]
    rows = by_own_sampler(read_json(board)["teachers"]) if board.exists() else []
    if shipped_as(told, rows) == told["updates"]:  # a board may be of earlier weights
        found += [(e.calls, e.distance) for e in rows]
    calls, best = min(found, key=lambda row: row[1].value, default=(0, None))
    return NOT_RUN if best is None else f"{with_error(best)} ({calls} calls)"


def by_own_sampler(teachers: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    """Those that no sampler was fitted to, whose rows tell what its fit had cost."""
    return [evaluation_of(r) for r in teachers if not r["training"]]


def on_board(file: Path, board: Board) -> str:
    """The best one-step student of a board over the best teacher there, of distillations alone."""
    if not file.exists():
        return NOT_RUN
    content = read_json(file)
    rows = current(board, content["rows"])
    resumed = {r["group"] for r in rows if r["resumes"]}
    told = over([r for r in rows if group_of(load(r["group"])) in GROUPS[:2]], content["teachers"], resumed)
    return "of an earlier recipe" if told == NOT_RUN and len(rows) < len(content["rows"]) else told


def apart(file: Path) -> str:
    """The same of a comparison of one recipe; UserError where it is of several, or not of 5,000 samples."""
    if not file.exists():
        return NOT_RUN
    content = read_json(file)
    if len({r["group"] for r in content["rows"]}) > 1 or {r["number"] for r in content["rows"]} != {5000}:
        raise UserError(f"{file}: must be a comparison of one recipe, with --samples 5000")
    # What was trained on and how it was measured, the row's name says; the rest makes another recipe of it.
    changed = [s for s in content["settings"] if not s.startswith(("data.", "teacher.", "evaluate."))]
    return over(content["rows"], content["teachers"], resumed_of(content), changed)


def over(
    rows: Sequence[Mapping[str, Any]],
    teachers: Sequence[Mapping[str, Any]],
    resumed: Container[str],
    changed: Sequence[str] = (),
) -> str:
    """The best student of one call, without guidance, over the best teacher by its own sampler: quotient and both.

    resumed: recipes with runs that were interrupted. changed: settings of the student that its name does not tell.
    """
    alone = [r for r in rows if r["calls"] == 1 and not is_guided(load(r["group"]))]
    own = by_own_sampler(teachers)
    if not alone or not own:
        return NOT_RUN
    best, beside = (min(es, key=lambda e: e.distance.value) for es in (map(evaluation_of, alone), own))
    seeds = len(best.metrics[str(distance_of(best))]["values"])
    told = ", ".join([f"{seeds} seed{'s' * (seeds != 1)}", *["interrupted"] * (best.name in resumed), *changed])
    student = f"`{best.name}` {with_error(best.distance)} ({told})"
    share = best.distance.value / beside.distance.value
    # As if apart: both are of the same noises, which makes the quotient's error less than this.
    error = share * hypot(*((e.distance.standard_error or 0.0) / e.distance.value for e in (best, beside)))
    held = beside.metrics[str(distance_of(beside))]
    chance = "" if held.get("usable", True) else f"; as many perfect samples have some {held['bias']:.2f}"
    return f"{share:.2f} ± {error:.2f}: {student} over {with_error(beside.distance)} ({beside.calls} calls){chance}"


def one_step_emoji(file: Path) -> str:
    """Captions found and saturation of the one-step student of the whole network."""
    if not file.exists():
        return NOT_RUN
    content = read_json(file)
    row = next((r for r in emoji.current(content) if r["recipe"] == "emoji-dmd2"), None)
    base = emoji.base_of(content, emoji.shipped_teacher())
    if row is None or base is None:
        return NOT_RUN
    share = row["saturation"] / base["saturation"] - 1
    return f"{100 * row['found']:.0f} %; {100 * share:+.1f} %" + " (interrupted)" * row["interrupted"]
