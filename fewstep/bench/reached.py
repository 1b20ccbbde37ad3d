"""What the shipped results were to reach, beside what they reached; a table of assets/README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.bench.board_table import current, evaluation_of
from fewstep.bench.boards import BOARDS
from fewstep.commands.compare.ranking import cells_line
from fewstep.commands.report import with_error
from fewstep.eval.protocol.evaluation import distance_of
from fewstep.files import read_json

NOT_RUN = "not run"


def table(folder: Path) -> str:
    """Of a folder such as the assets: each aim, and what the files there say of it."""
    lines = [cells_line(["what", "at least", "aim", "reached"]), cells_line(["---"] * 4)]
    found = relay(folder / "fashion-teacher")
    best = min(found, key=lambda m: m["value"], default=None)
    told = NOT_RUN if best is None else f"{best['value']:.2f} ± {best['error']:.2f} (N = {best['samples']:,})"
    lines.append(cells_line(["Fashion-MNIST teacher, FD, N = 10,000", "8", "5", told]))
    told = ratio(folder / "board-fashion.json", "fashion")
    lines.append(cells_line(["its best one-step student, FD over the teacher's", "1.1", "0.9", told]))
    captions = [m["retrieval"] for m in relay(folder / "emoji-teacher")]
    told = f"{100 * max(captions):.0f} %" if captions else NOT_RUN
    lines.append(cells_line(["emoji teacher, captions found", "97 %", "100 %", told]))
    told = one_step_emoji(folder / "emoji.json")
    what = "emoji one-step student, captions found; saturation against the teacher's"
    lines.append(cells_line([what, "90 %; ± 10 %", "97 %; ± 5 %", told]))
    told = ratio(folder / "board-digits.json", "digits")
    what = "digits student over teacher, FD, N = 5,000, three seeds, against the 1,797 pictures of the training"
    lines.append(cells_line([what, "1.1", "1.0", told]))
    told = apart(folder / "compare-held-out.json")
    lines.append(cells_line(["the same of a pair trained on 1,397, against the 400 held out", "1.1", "1.0", told]))
    return "\n".join(lines)


def relay(folder: Path) -> list[dict[str, Any]]:
    """What was measured of a teacher that ships."""
    file = folder / "relay.json"
    return list(read_json(file)["measured"]) if file.exists() else []


def ratio(file: Path, board: str) -> str:
    """The best one-step row of a board over its best teacher's."""
    if not file.exists():
        return NOT_RUN
    content = read_json(file)
    return over(current(BOARDS[board], content["rows"]), content["teachers"])


def apart(file: Path) -> str:
    """The same of a comparison."""
    if not file.exists():
        return NOT_RUN
    content = read_json(file)
    return over(content["rows"], content["teachers"])


def over(rows: Sequence[Mapping[str, Any]], teachers: Sequence[Mapping[str, Any]]) -> str:
    """The best student of one call over the best teacher: their quotient, and both with their errors."""
    students = [evaluation_of(r) for r in rows if r["calls"] == 1]
    known = [evaluation_of(r) for r in teachers]
    if not students or not known:
        return NOT_RUN
    best, beside = (min(found, key=lambda e: e.distance.value) for found in (students, known))
    seeds = len(best.metrics[str(distance_of(best))]["values"])
    student = f"{with_error(best.distance)} ({seeds} seed{'s' * (seeds != 1)})"
    share = best.distance.value / beside.distance.value
    return f"{share:.2f}: {student} over {with_error(beside.distance)} ({beside.calls} calls)"


def one_step_emoji(file: Path) -> str:
    """Captions found and saturation of the one-step student of the whole network."""
    if not file.exists():
        return NOT_RUN
    content = read_json(file)
    row = next((r for r in content["rows"] if r["recipe"] == "emoji-dmd2"), None)
    if row is None:
        return NOT_RUN
    share = row["saturation"] / content["saturation"]["guidance 1"] - 1
    return f"{100 * row['found']:.0f} %; {100 * share:+.1f} %"
