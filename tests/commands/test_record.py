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
from fewstep.commands.record import Entry, record
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
    # A standard deviation of 1 over three seeds, and .35 by their samples, which are of the same noises.
    assert entry.error == pytest.approx((1 / 3 + 0.35**2) ** 0.5)
    record(runs[:1], out)
    (line,) = out.read_text().splitlines()
    assert json.loads(line)["values"] == [1.0]
    # Another length is another number, beside the first.
    record([run_of(tmp_path / "long", "digits-dmd2", 0.5, "train.steps=9999")], out)
    assert len(out.read_text().splitlines()) == 2


def test_a_comparison_gives_each_recipe_at_its_own_steps_and_the_teacher_its_best(tmp_path: Path):
    found = {e.recipe: e for e in record([ASSETS / "compare-digits.json"], tmp_path / "1.jsonl")}
    assert found["digits-dmd2-4step"].steps == 4
    assert found["digits-dmd2-4step"].updates == 250
    # Its runs' commits, not that of the checkout in which the last of all was measured.
    assert (found["digits-sid"].commit, found["digits-icd"].commit) == ("525315b", "2fe7133")
    data = json.loads((ASSETS / "compare-digits.json").read_text())
    best = min(row["metrics"]["FD (house-digits)"]["value"] for row in data["teachers"])
    assert "digits-teacher" not in found  # its runs do not say what they were distilled from
    data["runs"][0]["teacher"] = {"path": "assets:digits-teacher", "sha256": "0"}
    data["rows"] = [r for r in data["rows"] if r["group"] == "digits-dmd2"]  # others have it as a flow
    (tmp_path / "told.json").write_text(json.dumps(data))
    found = {e.recipe: e for e in record([tmp_path / "told.json"], tmp_path / "2.jsonl")}
    assert (found["digits-teacher"].values, found["digits-teacher"].method) == ((best,), "denoise")
    for entry in record([ASSETS / "compare-fashion.json"], tmp_path / "3.jsonl"):
        assert entry.settings == ("train.batch=32",)


def of_teacher(folder: Path, recipe: str, path: str, **more: Any) -> Path:
    """A comparison of one recipe that says which teacher its run had."""
    data = json.loads((ASSETS / "compare-fashion.json").read_text()) | more
    data["rows"] = [data["rows"][0] | {"name": recipe, "group": recipe}]
    data["runs"] = [{"recipe": recipe, "commit": "abc1234", "teacher": {"path": path, "sha256": "0"}}]
    folder.mkdir(exist_ok=True)
    file = folder / f"{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps(data))
    return file


def test_a_teacher_in_two_comparisons_is_measured_once(tmp_path: Path):
    """Two equal values would have no spread, which was told as an error of zero."""
    settings = ["evaluate.metric=fashion-mnist", "evaluate.fitted=true"]
    files = [of_teacher(tmp_path / "in", "digits-dmd2", "assets:digits-teacher", settings=settings) for _ in range(2)]
    (teacher,) = [e for e in record(files, tmp_path / "out.jsonl") if e.recipe == "digits-teacher"]
    assert (len(teacher.values), teacher.error is not None and teacher.error > 0.1) == (1, True)
    # Neither what names the metric nor what is measured beside changes a recipe.
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert {tuple(json.loads(line)["settings"]) for line in lines} == {()}
    # As a flow as many steps lie at other levels.
    flow, own = {"settings": ["teacher.process={name: flow}"]}, str(tmp_path / "mine.yaml")
    for number, (recipe, more) in enumerate([("digits-imm", {}), ("digits-dmd2", flow), (own, {})]):
        other = of_teacher(tmp_path / "in", recipe, "assets:digits-teacher", **more)
        assert "digits-teacher" not in {e.recipe for e in record([other], tmp_path / f"{number}.jsonl")}


def test_a_teacher_of_several_legs_has_the_updates_of_the_weights_that_were_measured(tmp_path: Path):
    file = of_teacher(tmp_path / "in", "fashion-dmd2", "assets:fashion-teacher")
    # Of other weights than any that shipped.
    assert "fashion-teacher" not in {e.recipe for e in record([file], tmp_path / "none.jsonl")}
    relay = json.loads((ASSETS / "fashion-teacher" / "relay.json").read_text())
    for told in (relay["measured"][0], relay["shipped_before"][-1]):
        data = json.loads(file.read_text())
        row = next(r for r in data["teachers"] if r["steps"] == told["heun_steps"])
        row["number"] = told["samples"]
        (key,) = (k for k in row["metrics"] if k.startswith("FD"))
        row["metrics"][key]["value"] = told["value"]
        file.write_text(json.dumps(data))
        (entry,) = [e for e in record([file], tmp_path / "out.jsonl") if e.recipe == "fashion-teacher"]
        assert entry.updates == told.get("updates", relay["updates"]) != load("fashion-teacher").train.steps


def test_seeds_of_two_comparisons_have_the_error_of_as_many_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    files = [of_teacher(tmp_path, "digits-sid", "") for _ in range(2)]
    for file, values in zip(files, ((1.0, 3.0), (2.0, 4.0)), strict=True):
        data = json.loads(file.read_text())
        (key,) = (k for k in data["rows"][0]["metrics"] if k.startswith("FD"))
        data["rows"][0]["steps"] = 1
        data["rows"][0]["metrics"][key] |= {"values": values, "sampling_error": 0.25, "standard_error": 1.1}
        file.write_text(json.dumps(data))
    (entry,) = record([*files, Path(files[0].name)], tmp_path / "out.jsonl")  # one of them by two names
    assert entry.values == (1.0, 3.0, 2.0, 4.0)
    assert entry.error == pytest.approx((5 / 3 / 4 + 0.25**2) ** 0.5)
    assert "sampling" not in (tmp_path / "out.jsonl").read_text()


def test_another_number_of_samples_is_another_number(tmp_path: Path):
    """FD has a bias of some 600 over it."""
    data = json.loads((ASSETS / "compare-fashion.json").read_text())
    more = json.loads(json.dumps(data))
    for row in more["rows"]:
        row["number"] = 10000
    for name, content in (("few", data), ("many", more)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    out = tmp_path / "out.jsonl"
    found = record([tmp_path / "few.json", tmp_path / "many.json", tmp_path / "few.json"], out)
    seeds = {(e.recipe, e.samples): len(e.values) for e in found}
    assert seeds == {
        (r["group"], n): len(r["metrics"][distance]["values"])
        for r in data["rows"]
        if (distance := next(k for k in r["metrics"] if k.startswith("FD")))
        and r["steps"] == len(load(r["group"]).sampler().steps)
        for n in (1000, 10000)
    }
    assert len(out.read_text().splitlines()) == len(seeds)


def test_the_cards_numbers_are_those_of_the_files_that_commands_wrote(tmp_path: Path):
    lines = [json.loads(line) for line in (ASSETS / "results.jsonl").read_text().splitlines()]
    for source in ("compare-digits.json", "compare-fashion.json"):
        for entry in record([ASSETS / source], tmp_path / "out.jsonl"):
            wanted = (entry.recipe, entry.updates, entry.steps, entry.samples)
            (line,) = [e for e in lines if (e["recipe"], e["updates"], e["steps"], e["samples"]) == wanted]
            assert (line["values"], line["commit"]) == (list(entry.values), entry.commit)
    shown = [(r.value, r.seeds, r.commit) for _, r in measured({}) if r.setting == "digits-sid"]
    own = [e for e in lines if e["recipe"] == "digits-sid"]  # of 1,797 samples and of 5,000
    assert len(own) == 2
    means = [round(sum(e["values"]) / len(e["values"]), 2) for e in own]
    assert shown == [(value, len(e["values"]), e["commit"]) for value, e in zip(means, own, strict=True)]


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
