"""The tables of what was to be reached and of the emoji students: from the files, and nothing where a file is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fewstep.bench import emoji, reached
from fewstep.bench.board import assets
from fewstep.config import UserError
from fewstep.files import read_json
from fewstep.recipe.store import dump, load


def lines(text: str) -> dict[str, list[str]]:
    """Cells of each line by its first one."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_what_has_no_file_was_not_run_and_what_has_one_says_its_numbers(tmp_path: Path):
    empty = lines(reached.table(tmp_path))
    assert [cells[-1] for cells in list(empty.values())[2:]] == ["not run"] * 6
    (tmp_path / "fashion-teacher").mkdir()
    told = {"measured": [{"value": 9.0, "error": 0.5, "samples": 1000}, {"value": 7.0, "error": 0.25, "samples": 10000}]}
    (tmp_path / "fashion-teacher" / "relay.json").write_text(json.dumps(told))
    content = read_json(assets() / "board-digits.json")
    row = next(r for r in content["rows"] if r["group"] == "digits-dmd2")
    (name,) = (k for k in row["metrics"] if k.startswith("FD"))
    row["metrics"][name] |= {"value": 0.75, "standard_error": 0.125, "values": [0.5, 1.0]}
    for teacher, value in zip(content["teachers"], (50.0, 0.5, 0.6), strict=True):
        teacher["metrics"][name] |= {"value": value, "standard_error": 0.125}
    held = tmp_path / "compare-held-out.json"
    held.write_text(json.dumps(content))
    found = lines(reached.table(tmp_path))
    assert found["Fashion-MNIST teacher, FD, N = 10,000"][-1] == "7.00 ± 0.25 (N = 10,000)"
    pair = found["the same of a pair trained on 1,397, against the 400 held out"][-1]
    assert pair == "1.50: 0.75 ± 0.12 (2 seeds) over 0.50 ± 0.12 (15 calls)"
    # A board's row of an earlier recipe says nothing of today's.
    row["identity"] = "of before"
    (tmp_path / "board-digits.json").write_text(json.dumps(content))
    assert reached.ratio(tmp_path / "board-digits.json", "digits") == "not run"


def test_emoji_students_stand_beside_their_teacher_and_the_untrained_say_so():
    content, teacher = read_json(assets() / "emoji.json"), emoji.shipped_teacher()
    base, row = content["saturation"]["guidance 1"], content["rows"][0]
    row |= {"recipe": "emoji-dmd2", "value": 12.345, "found": 0.5, "saturation": 1.25 * base, "interrupted": True}
    found = lines(emoji.table(content, teacher))
    assert found["`emoji-dmd2`"][:5] == ["1", "12.3", "50 %", "1.25", f"{row['updates']} (interrupted)"]
    assert found["teacher, 8 Heun steps"][0] == "15"
    assert found["teacher, 8 Heun steps"][3] == "1.00"
    assert found["teacher, 8 Heun steps, guidance 1.5"][0] == "30"  # each Heun call is two of the network
    assert found["`emoji-dmd2-gan`"][1:4] == ["not run"] * 3


def test_only_finished_runs_of_recipes_as_they_ship_have_a_row(tmp_path: Path):
    def run(name: str, *settings: str) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "recipe.yaml").write_text(dump(load(name, list(settings))))
        return folder

    with pytest.raises(UserError, match="is no finished run"):
        emoji.row_of(run("emoji-dmd2"), interrupted=False)
    report = {"rows": [_evaluated(1)], "commit": "0123456789"}
    changed = run("emoji-dmd2", "optim.student.lr=1e-3")
    for folder in (changed, run("digits-dmd2")):
        (folder / "report").mkdir()
        (folder / "report" / "results.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"changes emoji-dmd2 \(optim\.student\.lr"):
        emoji.row_of(changed, interrupted=False)
    with pytest.raises(UserError, match="is no finished run of a recipe emoji-dmd2"):
        emoji.row_of(tmp_path / "2", interrupted=False)
    good = run("emoji-dmd2", "teacher.path=elsewhere", "evaluate.teacher_steps=[]", "train.seed=3")
    shutil.copytree(changed / "report", good / "report")
    told = emoji.row_of(good, interrupted=True)
    assert (told["value"], told["found"], told["commit"], told["interrupted"]) == (2.0, 0.75, "0123456", True)
    report["rows"][0]["metrics"].pop(emoji.FOUND)
    (good / "report" / "results.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="has no 'caption found among 100'"):
        emoji.row_of(good, interrupted=False)


def _evaluated(calls: int) -> dict[str, object]:
    row = read_json(assets() / "digits-dmd2.json")["rows"][-1]
    distance = next(iter(row["metrics"]))
    metrics = {distance: row["metrics"][distance] | {"value": 2.0}, emoji.FOUND: {"value": 0.75}}
    return row | {"calls": calls, "metrics": metrics}
