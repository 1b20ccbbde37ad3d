"""Numbers of runs and comparisons become lines that the method cards read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fewstep
from fewstep.cli import app
from fewstep.commands.record import Entry, of_comparison, record
from fewstep.config import UserError
from fewstep.eval.protocol.evaluation import Evaluation
from fewstep.recipe.cards import measured
from fewstep.recipe.store import dump, load

ASSETS = Path(fewstep.__file__).parents[1] / "assets"


def run_of(folder: Path, name: str, value: float, *settings: str, **report: Any) -> Path:
    """A finished run directory of a recipe, as `fewstep run` leaves it."""
    (folder / "report").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump(load(name, settings)))
    rows = [
        Evaluation(
            name=title,
            preset="fd-house-digits",
            preset_hash="0",
            extractor="house-digits",
            number=1797,
            metrics={"FD (house-digits)": {"value": found, "standard_error": error}},
        ).as_json()
        for title, found, error in (("teacher, 1 step", 55.6, 1.4), ("student, 1 step", value, 0.35))
    ]
    (folder / "report" / "results.json").write_text(json.dumps({"rows": rows, "commit": "abc1234", **report}))
    return folder


def test_a_run_gives_its_students_number_with_what_was_changed(tmp_path: Path):
    out = tmp_path / "results.jsonl"
    run = run_of(tmp_path / "a", "digits-dmd2", 0.75, "train.steps=700", "method.guidance=1.5")
    (entry,) = record([run], out)
    assert entry == Entry(
        recipe="digits-dmd2",
        method="dmd2",
        settings=("method.guidance=1.5",),
        metric="FD house-digits",
        steps=1,
        values=(0.75,),
        error=0.35,
        samples=1797,
        updates=700,
        commit="abc1234",
    )
    assert [json.loads(line)["updates"] for line in out.read_text().splitlines()] == [700]


def test_seeds_of_one_setting_are_one_entry_and_a_second_recording_replaces_it(tmp_path: Path):
    out = tmp_path / "results.jsonl"
    runs = [run_of(tmp_path / f"s{i}", "digits-dmd2", 1.0 + i, f"train.seed={i}") for i in range(3)]
    (entry,) = record(runs, out)
    assert entry.values == (1.0, 2.0, 3.0)
    assert entry.settings == ()
    assert entry.error == pytest.approx(1 / 3**0.5)  # standard deviation 1 over three seeds
    record(runs[:1], out)
    (line,) = out.read_text().splitlines()
    assert json.loads(line)["values"] == [1.0]
    # Another length is another number, beside the first.
    record([run_of(tmp_path / "long", "digits-dmd2", 0.5, "train.steps=9999")], out)
    assert len(out.read_text().splitlines()) == 2


def test_a_comparison_gives_each_recipe_at_its_own_steps_and_the_teacher_its_best(tmp_path: Path):
    found = {e.recipe: e for e in of_comparison(ASSETS / "compare-digits.json")}
    assert found["digits-dmd2-4step"].steps == 4
    assert found["digits-dmd2-4step"].updates == 250
    # Its runs' commits, not that of the checkout in which the last of all was measured.
    assert (found["digits-sid"].commit, found["digits-icd"].commit) == ("525315b", "2fe7133")
    data = json.loads((ASSETS / "compare-digits.json").read_text())
    best = min(row["metrics"]["FD (house-digits)"]["value"] for row in data["teachers"])
    assert "digits-teacher" not in found  # its runs do not say what they were distilled from
    data["runs"][0]["teacher"] = {"path": "assets:digits-teacher", "sha256": "0"}
    (tmp_path / "told.json").write_text(json.dumps(data))
    found = {e.recipe: e for e in of_comparison(tmp_path / "told.json")}
    assert (found["digits-teacher"].values, found["digits-teacher"].method) == ((best,), "denoise")
    for entry in of_comparison(ASSETS / "compare-fashion.json"):
        assert entry.settings == ("train.batch=32",)


def test_a_teacher_in_two_comparisons_is_measured_once_and_has_the_updates_of_its_legs(tmp_path: Path):
    """Two equal values would have no spread, which was told as an error of zero."""
    data = json.loads((ASSETS / "compare-fashion.json").read_text()) | {"settings": ["evaluate.metric=fashion-mnist"]}
    teacher = {"path": "assets:fashion-teacher", "sha256": "0"}
    data["runs"] = [{"recipe": "fashion-cd", "commit": "abc1234", "teacher": teacher}]
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text(json.dumps(data))
    record([tmp_path / "one.json", tmp_path / "two.json"], tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    (line,) = [e for e in lines if e["recipe"] == "fashion-teacher"]
    assert (len(line["values"]), line["error"] > 0.1) == (1, True)
    relay = json.loads((ASSETS / "fashion-teacher" / "relay.json").read_text())
    assert line["updates"] == relay["updates"] != load("fashion-teacher").train.steps
    # What names the metric changes no recipe.
    assert {tuple(e["settings"]) for e in lines} == {()}


def test_the_cards_numbers_are_those_of_the_files_that_commands_wrote():
    lines = [json.loads(line) for line in (ASSETS / "results.jsonl").read_text().splitlines()]
    for source in ("compare-digits.json", "compare-fashion.json"):
        for entry in of_comparison(ASSETS / source):
            wanted = (entry.recipe, entry.updates, entry.steps)
            (line,) = [e for e in lines if (e["recipe"], e["updates"], e["steps"]) == wanted]
            assert (line["values"], line["commit"]) == (list(entry.values), entry.commit)
    shown = [r for _, r in measured({}) if r.setting == "digits-sid"]
    (line,) = [e for e in lines if e["recipe"] == "digits-sid"]
    assert shown[0].value == round(sum(line["values"]) / len(line["values"]), 2)
    assert (shown[0].seeds, shown[0].commit) == (len(line["values"]), line["commit"])


def test_what_has_no_number_is_refused(tmp_path: Path):
    run = run_of(tmp_path / "a", "digits-dmd2", 0.75)
    (run / "report" / "results.json").unlink()
    with pytest.raises(UserError, match=r"a: has no report/results.json; the run is not finished"):
        record([run], tmp_path / "out.jsonl")
    (run / "recipe.yaml").write_text(dump(replace(load("digits-dmd2"), about="my own")))
    (run / "report" / "results.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(UserError, match=r"is no run of a shipped recipe \(about: my own\)"):
        record([run], tmp_path / "out.jsonl")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x.json: is no file by `fewstep compare`: 'rows'"):
        record([tmp_path / "x.json"], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_prints_what_it_put_there(tmp_path: Path):
    run = run_of(tmp_path / "a", "digits-sid", 2.0)
    done = CliRunner().invoke(app, ["methods", "record", str(run), "--out", str(tmp_path / "r.jsonl")])
    assert done.output == f"digits-sid: FD house-digits 2 at 1 step, {load('digits-sid').train.steps} updates\n"
