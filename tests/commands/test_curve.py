"""The curve of a comparison: points where they are due, none of their cost charged, a picture and a column."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from tiny_compare import train

from fewstep.commands.compare import ranking
from fewstep.commands.compare.budget import Budget
from fewstep.commands.compare.curve import Curve, marks, read, save, settled


def test_marks_are_even_and_leave_the_end_to_the_result():
    assert marks([100], 5) == {20, 40, 60, 80}
    assert marks([3], 10) == {1, 2}
    assert marks([7], 2) == {4}


def test_marks_of_a_run_in_stages_lie_in_its_last():
    """Three in four of a toy recipe's updates are the start that its method shares with all others."""
    assert marks([3000, 400], 4) == {3000, 3100, 3200, 3300}
    assert marks([10, 20, 1], 4) == {30}
    assert marks([10, 20, 8], 2) == {30, 34}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([9.0, 2.05, 1.97, 2.0], 2.0),
        ([9.0, 2.05, 1.5, 2.0], None),  # it moved by more than 5 % until its end
        ([2.0, 9.0, 2.0, 2.0], 3.0),  # what was near before it left does not count
        ([2.0], None),
        ([-2.0, -2.01, -2.0], 1.0),
        ([9.0, 2.0, float("nan")], None),
        ([2.0, float("nan"), 2.0, 2.0], 3.0),
        ([9.0, float("inf")], None),
    ],
)
def test_settled_is_the_first_moment_after_which_nothing_leaves(values: list[float], expected: float | None):
    points = [{"cpu_seconds": k + 1.0, "value": v} for k, v in enumerate(values)]
    assert settled(points) == expected
    assert settled([]) is None


def test_measuring_is_not_charged(tmp_path: Path):
    def run(measure: bool) -> Any:
        def watch(account: Any) -> None:
            if measure:
                here.append(account)
                curve.add(account)

        return train("toy/kd", 30, "method.teacher_steps=1", budget=Budget("calls", 41 * 18), watch=watch)

    here: list[Any] = []

    def distance() -> float:
        return float(here[-1].trainer.roles.student(*probe(here[-1])).x0.detach().mean())

    curve = Curve(tmp_path / "curve.jsonl", set(range(1, 31)), distance)

    def probe(account: Any) -> tuple[Any, ...]:
        batch = account.trainer.loop.batch(account.trainer.recipe.stages()[-1], (0, 0), 0)
        x = batch.draws.normal(2)
        return x, batch.draws.uniform(), batch.cond

    plain, measured = run(False), run(True)
    assert measured._calls.total > plain._calls.total  # they were taken
    assert [p["network_calls"] for p in read(curve.path)][-1] <= measured.spent.calls
    assert measured.spent.calls == plain.spent.calls
    assert measured.trainer.progress.done == plain.trainer.progress.done


def test_points_of_what_is_trained_again_are_dropped(tmp_path: Path):
    path = tmp_path / "curve.jsonl"
    numbers = iter((3.0, 2.0, 1.5))
    curve = Curve(path, {5, 10}, lambda: next(numbers))

    class Account:
        spent = SimpleNamespace(seconds=2.0, cpu_seconds=1.0, calls=7)
        trainer = SimpleNamespace(progress=SimpleNamespace(done=0))

        def aside(self) -> Any:
            from contextlib import nullcontext

            return nullcontext()

    account: Any = Account()
    for done in range(1, 11):
        account.trainer.progress.done = done
        curve.add(account)
    assert [(p["updates"], p["value"], p["network_calls"]) for p in read(path)] == [(5, 3.0, 7), (10, 2.0, 7)]
    with path.open("a") as f:
        f.write(json.dumps(read(path)[0] | {"updates": 3}) + "\n")  # by marks of another version
        f.write('{"updates": 11, "val')  # what a kill leaves
    curve.cut(7)
    curve.add(account)
    assert [(p["updates"], p["value"]) for p in read(path)] == [(5, 3.0), (10, 1.5)]


def test_a_picture_of_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = [{"cpu_seconds": s, "value": v} for s, v in ((1.0, 9.0), (2.0, 3.0))]
    assert not save({"a": [()], "b": []}, "FD", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert save({"a": [run, run], "b": [()]}, "FD", tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size > 5000
    # An energy distance can be below zero.
    seen: list[tuple[str, float]] = []
    savefig = Figure.savefig

    def look(figure: Figure, *args: Any, **more: Any) -> None:
        (axis,) = figure.axes
        seen.append((axis.get_yscale(), axis.get_ylim()[0]))
        savefig(figure, *args, **more)

    monkeypatch.setattr(Figure, "savefig", look)
    assert save({"a": [[*run, {"cpu_seconds": 3.0, "value": -0.1}]]}, "energy", tmp_path / "signed.png")
    for odd in ([float("nan")], [float("inf"), -0.0]):
        runs = [[*run, *({"cpu_seconds": 3.0, "value": v} for v in odd)]]
        assert save({"a": runs}, "energy", tmp_path / "odd.png")
    assert seen == [("symlog", -0.2), ("log", seen[1][1]), ("symlog", -6.0)]


def test_a_mean_over_seeds_needs_every_seed():
    ended = [{"cpu_seconds": s, "value": v} for s, v in ((1.0, 2.0), (2.0, 2.0))]
    moving = [{"cpu_seconds": s, "value": v} for s, v in ((1.0, 9.0), (2.0, 2.0))]
    assert ranking.mean_settled([{"curve": ended}, {"curve": [{**p, "cpu_seconds": 3.0} for p in ended]}]) == 2.0
    assert ranking.mean_settled([{"curve": ended}, {"curve": moving}]) is None
    assert ranking.mean_settled([{}, {}]) is None
