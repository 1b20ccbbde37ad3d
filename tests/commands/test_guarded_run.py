"""`fewstep run` under its guard: the exit code, what is said, and whether the run says that it succeeded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from calling import called

from fewstep.commands.run import GUARDED, _train
from fewstep.recipe.store import load
from fewstep.train.verdicts import Course, Verdict

SHORT = (
    "student.width=16",
    "student.depth=2",
    "before=[]",
    "copy={}",
    "train.steps=30",
    "train.batch=32",
    "train.log_every=5",
    "train.readings_every=5",
    "train.checkpoint_every=10",
    "train.sample_every=0",
    "evaluate.samples=64",
    "evaluate.teacher_steps=[1]",
)


def run(out: Path, capfd: pytest.CaptureFixture[str], *settings: str) -> tuple[int, str, str]:
    code, told, errors = called(capfd, "run", "toy/dmd2", *SHORT, *settings, "--out", out)
    assert "Traceback" not in told + errors
    return code, told, errors


def test_a_run_says_whether_it_succeeded_and_where_it_was_best(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    code, told, _ = run(tmp_path / "good", capfd, "success=energy <= 1e9")
    assert code == 0
    assert "\nsuccess: energy <= 1e+09 was asked for, it is " in told
    assert "best at step " in told
    report = json.loads((tmp_path / "good" / "report" / "results.json").read_text())
    assert report["success"]["met"] is True
    assert report["peak"]["done"] in range(5, 31, 5)
    code, told, _ = run(tmp_path / "bad", capfd, "success=energy <= 0", "train.eval_every=10")
    assert code == 0
    assert "\nno success: energy <= 0 was asked for, it is " in told
    peak = json.loads((tmp_path / "bad" / "report" / "results.json").read_text())["peak"]
    assert peak["by"] == "energy x1000"
    log = [json.loads(line) for line in (tmp_path / "bad" / "log.jsonl").read_text().splitlines()]
    values = {r["done"]: r["evaluation"]["energy x1000"]["value"] for r in log if "evaluation" in r}
    assert peak["value"] == min(values.values()) == values[peak["done"]]
    assert (tmp_path / "bad" / "checkpoints" / f"step-{peak['done']:08d}").is_dir()


def test_a_metric_that_the_preset_does_not_measure_is_refused_before_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    code, _, errors = run(tmp_path / "run", capfd, "success=fd <= 2")
    assert code == 2
    assert "success: fd <= 2: preset energy measures energy alone" in errors
    assert not (tmp_path / "run").exists()


def test_a_run_that_its_guard_ends_has_a_code_and_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    alarm = Verdict("darkening", "alarm", -0.5, -0.35, "samples are dark", "lower it")
    monkeypatch.setattr(Course, "alarms", lambda self: [alarm] if self.last[0] > 15 else [])
    out = tmp_path / "run"
    code, told, _ = run(out, capfd, "train.guard=stop", "success=energy <= 1e9")
    assert code == GUARDED == 4
    assert "step 20: ALARM darkening: samples are dark (line -0.35); lower it" in told
    best, success, last = told.strip().splitlines()[-3:]
    assert re.fullmatch(r"best at step \d+ of 20, by readings of samples \(.*\); checkpoints kept: .*step-00000020", best)
    assert success == "no success: energy <= 1e+09 was asked for, it was not measured"
    assert last.startswith("stopped by train.guard at step 20: darkening; samples are dark.")
    assert last.endswith(f"fewstep eval {out}, fewstep export {out}")
    assert not (out / "report" / "results.json").exists()


def test_every_process_takes_the_distance_in_the_metrics_features(tmp_path: Path):
    """What the processes read is averaged: one of them in raw values would be half of the record."""
    recipe = load("toy/dmd2", [])
    readings = SimpleNamespace(features=None)
    other: Any = SimpleNamespace(recipe=recipe, guard=SimpleNamespace(readings=readings), fit=lambda: None, hooks=None)
    judge: Any = SimpleNamespace(features=lambda x: x)
    _train(other, tmp_path, False, judge)
    assert readings.features is judge.features
