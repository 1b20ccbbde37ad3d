"""Seconds on the leaderboard: none that were taken beside other work, but those at rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from board_rows import MACHINE, comparison, row

from fewstep.bench.board import main, measured, was_busy
from fewstep.bench.board_table import lines
from fewstep.bench.boards import BOARDS
from fewstep.bench.pace import TIMED, pace
from fewstep.commands import sources
from fewstep.config import UserError
from fewstep.files import read_json
from fewstep.recipe.store import load


def test_a_row_made_beside_other_work_shows_no_seconds_but_those_at_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fewstep.bench.board.dirty", lambda: False)
    monkeypatch.setattr("fewstep.bench.board.environment", lambda: MACHINE | {"commit": "of now"})
    told = {"cpu_seconds": 4.0, "timed": 25, "commit": "c"}
    monkeypatch.setattr(
        "fewstep.bench.board.pace",
        lambda recipe, counts, teachers: (
            told | {"seconds": {str(n): n / 2 for n in counts}, "teachers": {name: n / 4 for name, n in teachers}}
        ),
    )
    rows = comparison(tmp_path / "a.json", row("digits-kd", 1.0), row("digits-kd", 0.5, 2))
    where, file = ["--out", str(tmp_path)], tmp_path / "board-digits.json"
    with pytest.raises(UserError, match="--pace digits-kd: has no row"):
        main(["digits", "--pace", "digits-kd", *where])
    main(["digits", "--take", str(rows), "--busy", *where])
    shown = capsys.readouterr().out
    assert "| 1.00 | 0.500 | – | 1,400 | – | – | 512 |" in shown
    assert "| teacher, 8 steps | 8 | 0.50 ± 0.25 | 75.0 % | 1.00 | 0.500 | – |" in shown
    assert not (tmp_path / "board-digits.png").exists()
    main(["digits", "--pace", "digits-kd", *where])
    shown = capsys.readouterr().out
    assert (
        "| `digits-kd` | kd | 1 | 1.00 ± 0.25 | 2 | 75.0 % | 1.00 | 0.500 | ≈ 0.50 | 1,400 | ≈ 4 | ≈ 2 | 512 |" in shown
    )
    assert (
        "| `digits-kd` | kd | 2 | 0.50 ± 0.25 | 2 | 75.0 % | 1.00 | 0.500 | ≈ 1.00 | 1,400 | ≈ 4 | ≈ 2 | 512 |" in shown
    )
    assert "| teacher, 8 steps | 8 | 0.50 ± 0.25 | 75.0 % | 1.00 | 0.500 | ≈ 2.00 |" in shown
    assert (tmp_path / "board-digits.png").exists()
    # Made beside other work again, a teacher keeps what was timed at rest.
    main(["digits", "--take", str(comparison(tmp_path / "d.json", row("digits-sid", 1.0))), "--busy", *where])
    assert "| teacher, 8 steps | 8 | 0.50 ± 0.25 | 75.0 % | 1.00 | 0.500 | ≈ 2.00 |" in capsys.readouterr().out
    # 2 s of one seed at its end, where the mean of both were 8: each ends at the 4 s of its training at rest.
    runs = lines(BOARDS["digits"], read_json(file))["digits-kd"]
    points = [[(p["updates"], p["cpu_seconds"]) for p in run] for run in runs]
    assert points == [[(1, 2.0), (2, 4.0)]] * 2
    with pytest.raises(UserError, match="--pace: times rows that are there, on a machine at rest; give it alone"):
        main(["digits", "--pace", "digits-kd", "--busy", *where])
    monkeypatch.setattr("fewstep.bench.board.environment", lambda: MACHINE | {"threads": "2"})
    with pytest.raises(UserError, match=r"--pace digits-kd: here is .*'threads': '2'.*; a board is of one machine"):
        main(["digits", "--pace", "digits-kd", *where])
    alone = comparison(tmp_path / "c.json", row("digits-cd", 1.0))
    main(["digits", "--take", str(alone), *where])
    with pytest.raises(UserError, match="--pace digits-cd: its row has seconds, taken at rest"):
        main(["digits", "--pace", "digits-cd", *where])
    main(["digits", "--take", str(rows), "--busy", *where])
    assert [t["busy"] for t in read_json(file)["teachers"]] == [False]  # one at rest has seconds, and stays
    old = comparison(tmp_path / "b.json", row("digits-kd", 1.0), run={"identity": "of before"})
    main(["digits", "--take", str(old), "--busy", *where])
    with pytest.raises(UserError, match="its row is of an earlier recipe"):
        main(["digits", "--pace", "digits-kd", *where])


def test_what_was_busy_stays_so_until_it_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    board, marks = BOARDS["digits"], []

    def compare(recipes: Any, budget: str, seeds: int, folder: Path, resume: bool, *_: Any) -> Path:
        marks.append(was_busy(folder / "results.json").exists())
        if folder.exists() and not resume:
            raise UserError("holds a comparison")
        folder.mkdir(exist_ok=True)
        return folder / "results.json"

    monkeypatch.setattr("fewstep.bench.board.compare", compare)
    measured(board, "digits-kd", 1, 2, tmp_path, resume=False, busy=True)
    for busy in (True, False):
        with pytest.raises(UserError, match="holds a comparison"):
            measured(board, "digits-kd", 1, 2, tmp_path, resume=False, busy=busy)
    measured(board, "digits-kd", 1, 2, tmp_path, resume=True, busy=False)
    (tmp_path / "digits-kd").rmdir()
    measured(board, "digits-kd", 1, 2, tmp_path, resume=False, busy=False)
    with pytest.raises(UserError, match="holds a comparison"):
        measured(board, "digits-kd", 1, 2, tmp_path, resume=False, busy=True)
    assert marks == [True, True, True, True, False, False]


def test_a_pace_counts_the_first_update_of_each_stage_once(monkeypatch: pytest.MonkeyPatch):
    """Stages of 3 and 1,000 updates, the first of each dearer: 7 + 2 x 2 and 50 + 999 x .5 seconds."""
    recipe = load("toy/cd", ["train.steps=1000"])
    before = recipe.stages()[0]
    recipe = replace(recipe, before=(replace(before, steps=3),))
    costs = iter([7.0, 2.0, 2.0, 50.0, *[0.5] * TIMED])
    now = 0.0

    def process_time() -> float:
        return now

    def stepped(account: Any, trainer: Any) -> None:
        nonlocal now
        now += next(costs)
        account.settle()
        account.watch(account)

    monkeypatch.setattr("fewstep.commands.compare.budget.time.process_time", process_time)
    monkeypatch.setattr("fewstep.commands.compare.budget.Accounted._stepped", stepped)
    monkeypatch.setattr("fewstep.bench.pace.seconds_per_1000", lambda make, indices: float(len(make(indices[:3]))))
    drawn: list[tuple[str, int]] = []
    of_product_ = sources.of_product

    def of_product(preset: Any, product: Any, note: str) -> Any:
        drawn.append((product.sampler.kind, len(product.sampler.steps)))
        return of_product_(preset, product, note)

    monkeypatch.setattr("fewstep.bench.pace.of_product", of_product)
    told = pace(recipe, [1, 2], [("teacher, 2 steps", 2), ("teacher fitted, 4 calls", 4)])
    assert told["teachers"] == {"teacher, 2 steps": 3.0, "teacher fitted, 4 calls": 3.0}
    assert drawn == [("renoise", 1), ("renoise", 2), ("ode", 2), ("map", 4)]
    assert told["cpu_seconds"] == pytest.approx(7 + 4 + 50 + 999 * 0.5)
    assert (told["timed"], told["seconds"]) == (3 + 1 + TIMED, {"1": 3.0, "2": 3.0})
    assert next(costs, None) is None
