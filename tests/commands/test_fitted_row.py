"""The fitted teacher beside students: when it is fitted unasked, in a run's table and in comparisons."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calling import called
from tiny_teacher import make_teacher, student_settings

from fewstep.commands import finish, fitted_row
from fewstep.commands.compare import compare, one_run
from fewstep.commands.fitted_row import NOISES, POINTS, SHARE, calls_of, wish_for
from fewstep.commands.fitting import expected_calls
from fewstep.commands.record import record
from fewstep.recipe.schema import Evaluate
from fewstep.recipe.store import load

TWO = ("method.steps=[1.0, 0.5]", "evaluate.fitted=true")
EVALUATION = "evaluate={metric: fd-house-digits, samples: 20, teacher_steps: [1]}"


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    for module, name, value in ((fitted_row, "POINTS", 5), (fitted_row, "NOISES", 2)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(one_run, "POINTS", 5)
    monkeypatch.setattr(one_run, "NOISES", 2)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    teacher = make_teacher(tmp_path_factory.mktemp("models") / "teacher")
    return [s for s in student_settings(teacher) if not s.startswith("evaluate")]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: Any) -> tuple[int, str]:
        code, out, err = called(capfd, *arguments)
        return code, out + err

    return run


def test_it_is_fitted_unasked_where_it_is_cheap(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fitted_row, "POINTS", POINTS)
    monkeypatch.setattr(fitted_row, "NOISES", NOISES)
    recipe = load("digits-dmd2", ["method.steps=[1.0, 0.7, 0.5, 0.2]"])
    spec, teacher = Evaluate(metric="fd-house-digits"), recipe.teacher
    wish = wish_for(spec, teacher, [4], 1e9)
    assert wish is not None
    assert (wish.calls, wish.points, wish.noises) == ((4,), POINTS, NOISES)
    edge = expected_calls(wish) / SHARE
    assert wish_for(spec, teacher, [4], edge * 1.01) == wish
    assert wish_for(spec, teacher, [4], edge * 0.99) is None
    assert wish_for(replace(spec, fitted=True), teacher, [4], 1) == wish
    assert wish_for(replace(spec, fitted=False), teacher, [4], 1e9) is None
    assert wish_for(spec, teacher, [1], 1e9) is None  # one call leaves nothing to fit
    assert wish_for(spec, None, [4], 1e9) is None
    ring = load("toy/dmd2").teacher
    assert wish_for(spec, ring, [4], 1e9) is None
    assert wish_for(replace(spec, fitted=True), ring, [4], 1) == wish
    # The grid begins at 1, where a bridge is its source and DDIM 0/0.
    bridge = load("digits-deblur-ibmd").teacher
    assert wish_for(spec, bridge, [4], 1e9) is None
    assert wish_for(replace(spec, fitted=True), bridge, [4], 1e9) is None
    # Student, critic and discriminator are trained, at three passes a sample each.
    assert calls_of(recipe) == 3 * 3 * recipe.train.batch * recipe.train.steps
    assert wish_for(spec, teacher, [4], calls_of(recipe)) == wish


def test_a_runs_table_has_it_before_the_student(
    call: Callable[..., tuple[int, str]], settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    code, said = call("run", "digits-dmd2", *settings, EVALUATION, *TWO, "--out", run)
    assert code == 0, said
    rows = json.loads((run / "report" / "results.json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["teacher, 1 step", "teacher fitted, 2 calls", "student, 2 steps"]
    assert (rows[1]["calls"], rows[1]["number"]) == (2, 20)

    def broken(*_: Any) -> Any:
        raise ArithmeticError("no")

    monkeypatch.setattr(finish, "fitted_teacher", broken)
    code, said = call("run", "digits-dmd2", *settings, EVALUATION, *TWO, "--out", run, "--resume")
    assert code == 0
    assert "note: the teacher was not fitted: ArithmeticError: no; evaluate.fitted=false leaves it out" in said
    rows = json.loads((run / "report" / "results.json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["teacher, 1 step", "student, 2 steps"]


def test_a_comparison_has_it_and_takes_a_fit_as_a_run_without_updates(
    call: Callable[..., tuple[int, str]], settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compare, "run_one", lambda _context, task: one_run.work(task))
    monkeypatch.chdir(tmp_path)
    teacher = next(s for s in settings if s.startswith("teacher.path=")).partition("=")[2]
    (Path(teacher) / "fewstep.json").write_text('{"classes": 10}')
    made = call("fit", teacher, "--calls", "2,3", "--points", "4", "--noises", "2", "--no-table", "--out", "fit")
    assert made[0] == 0, made[1]
    sets = [x for s in (*settings, EVALUATION, *TWO) if not s.startswith("train.steps") for x in ("--set", s)]
    told = ("compare", "digits-dmd2", "fit", "--budget", "updates=2", "--seeds", "1", *sets, "--out", "out")
    code, said = call(*told)
    assert code == 0, said
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {(r["name"], r["calls"]): r for r in found["rows"]}
    assert set(rows) == {("digits-dmd2", 2), ("fit", 2), ("fit", 3)}
    assert (rows["fit", 2]["training"]["method"], rows["fit", 2]["training"]["updates"]) == ("fitted", 0)
    assert rows["fit", 3]["training"]["network_calls"] > 0
    assert rows["digits-dmd2", 2]["training"]["updates"] == 2
    assert [r["name"] for r in found["teachers"]] == ["teacher, 1 step", "teacher fitted, 2 calls"]
    assert found["teachers"][1]["training"]["updates"] == 0
    assert "| `fit` | fitted |" in (tmp_path / "out" / "report.md").read_text()
    # Of a folder's own teacher the cards take nothing, of a shipped one its own number, not that of its fit.
    assert record([tmp_path / "out" / "results.json"], tmp_path / "none.jsonl") == []
    plain = found["teachers"][0]["metrics"]["FD (house-digits)"]["value"]
    (run,) = (r for r in found["runs"] if r["recipe"] == "digits-dmd2")
    assert run["teacher"]["path"] == teacher
    run["teacher"]["path"] = "assets:digits-teacher"
    (tmp_path / "shipped.json").write_text(json.dumps(found))
    assert [e.values for e in record([tmp_path / "shipped.json"], tmp_path / "cards.jsonl")] == [(plain,)]
    # A fit of another kind in its place is measured again; nothing else is.
    small = ("--calls", "2", "--points", "4", "--noises", "2", "--no-table")
    assert call("fit", teacher, *small, "--force", "--out", "fit")[0] == 0
    code, said = call(*told, "--resume")
    assert code == 0, said
    assert said.count("done before") == 3, said
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {(r["name"], r["calls"]) for r in found["rows"]} == {("digits-dmd2", 2), ("fit", 2)}
    code, said = call("compare", "fit", "--budget", "updates=2", "--out", "other")
    assert code == 2
    assert "name a recipe too" in said
