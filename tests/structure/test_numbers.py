"""The tables of what was to be reached and of the emoji students: from the files, and nothing where a file is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.bench import emoji, reached
from fewstep.bench.board import assets
from fewstep.bench.boards import BOARDS, digest_of
from fewstep.config import UserError
from fewstep.eval.protocol.evaluation import Evaluation
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
    known = [(6.0, 0.5, 1000, 1.0), (6.5, None, 10000, 1.5), (7.0, 0.25, 10000, 1.0), (8.0, None, 10000, 1.0)]
    keys = ("value", "error", "samples", "guidance")
    told = {"updates": 9, "measured": [dict(zip(keys, row, strict=True)) | {"heun_steps": 8} for row in known]}
    (tmp_path / "fashion-teacher" / "relay.json").write_text(json.dumps(told))
    content = read_json(assets() / "board-digits.json")
    row = next(r for r in content["rows"] if r["group"] == "digits-dmd2")
    (name,) = (k for k in row["metrics"] if k.startswith("FD"))
    row["resumes"] = 0
    row["metrics"][name] |= {"value": 0.75, "standard_error": 0.125, "values": [0.5, 1.0]}
    first = content["teachers"][0]
    content["teachers"] = []
    for value, calls, training in ((50.0, 1, {}), (0.5, 15, {}), (0.25, 4, {"method": "fitted"})):
        teacher = json.loads(json.dumps(first)) | {"calls": calls, "training": training}
        teacher["metrics"][name] |= {"value": value, "standard_error": 0.125}
        content["teachers"].append(teacher)
    content |= {"rows": [row], "runs": [{"recipe": "digits-dmd2", "resumes": 0}], "settings": ["data.held_out=0.2"]}
    held = tmp_path / "compare-held-out.json"
    held.write_text(json.dumps(content))
    found = lines(reached.table(tmp_path))
    assert found["Fashion-MNIST teacher, FD, N = 10,000"][-1] == "7.00 ± 0.25 (15 calls)"
    better = [t | {"number": 10000, "steps": t["calls"] // 2 + 1} for t in content["teachers"]]
    (tmp_path / "board-fashion.json").write_text(json.dumps({"rows": [], "teachers": better}))
    assert reached.teacher(tmp_path) == "7.00 ± 0.25 (15 calls)"  # the board may be of other weights
    (relay,) = tmp_path.glob("*/relay.json")
    relay.write_text(
        json.dumps(told | {"measured": [*told["measured"], {**told["measured"][2], "value": 50.0, "heun_steps": 1}]})
    )
    assert reached.teacher(tmp_path) == "0.50 ± 0.12 (15 calls)"  # not the fitted one's 0.25
    pair = found["the same of a pair trained on 1,397, against the 400 held out"][-1]
    assert pair == "1.50 ± 0.45: `digits-dmd2` 0.75 ± 0.12 (2 seeds) over 0.50 ± 0.12 (15 calls)"
    content["runs"][0]["resumes"] = 1
    content["teachers"][1]["metrics"][name] |= {"usable": False, "bias": 0.25}
    held.write_text(json.dumps(content))
    told = reached.apart(held)
    assert told == pair.replace("seeds)", "seeds, interrupted)") + "; as many perfect samples have some 0.25"
    held.write_text(json.dumps(content | {"settings": ["data.held_out=0.2", "method.gan=null"]}))
    assert reached.apart(held) == told.replace("interrupted)", "interrupted, method.gan=null)")
    content["teachers"][1]["metrics"][name] |= {"usable": True}
    # Neither what aims at another distribution, nor what distils nothing, nor what takes more calls is that student.
    for group, calls in (("digits-tdd", 1), ("digits-ect", 1), ("digits-dmd2-4step", 4)):
        better = json.loads(json.dumps(row)) | {
            "group": group,
            "name": group,
            "calls": calls,
            "identity": digest_of(group),
        }
        better["metrics"][name] |= {"value": 0.125}
        content["rows"].append(better)
    board = tmp_path / "board-digits.json"
    board.write_text(json.dumps(content))
    assert reached.on_board(board, BOARDS["digits"]) == pair
    row["resumes"] = 1
    board.write_text(json.dumps(content))
    assert reached.on_board(board, BOARDS["digits"]) == pair.replace("seeds)", "seeds, interrupted)")
    held.write_text(json.dumps(content))
    with pytest.raises(UserError, match="must be a comparison of one recipe, with --samples 5000"):
        reached.table(tmp_path)
    # A row of an earlier recipe says nothing of today's.
    content["rows"] = [row | {"identity": "of before"}]
    board.write_text(json.dumps(content))
    assert reached.on_board(board, BOARDS["digits"]) == "of an earlier recipe"


def test_emoji_students_stand_beside_their_teacher_and_the_untrained_say_so(tmp_path: Path):
    content, teacher = read_json(assets() / "emoji.json"), emoji.shipped_teacher()
    base, row = emoji.base_of(content, teacher), content["rows"][0]
    assert base is content["shown"]["8 steps, guidance 1"]
    own = {"saturation": 1.25 * base["saturation"], "sides": 0.75 * content["shown"]["data"]["sides"]}
    row |= {"recipe": "emoji-dmd2", "value": 12.345, "found": 0.5, "interrupted": True} | own
    content["rows"] = [row]
    content["also"] = [{"heun_steps": 2, "guidance": 1.0, "value": 23.456, "retrieval": 0.75}]
    content["shown"]["2 steps, guidance 1"] = {k: 0.5 * v for k, v in base.items()}
    found = lines(emoji.table(content, teacher))
    sides = 0.5 * base["sides"] / content["shown"]["data"]["sides"]
    assert found["teacher, 2 Heun steps"] == ["3", "23.5", "75 %", "0.50", f"{sides:.2f}", f"{teacher['updates']:,}"]
    assert "teacher, 2 Heun steps" not in lines(emoji.table(content | {"teacher": 1}, teacher))  # of another one
    assert found["the data"][2:5] == [
        "100 %",
        f"{content['shown']['data']['saturation'] / base['saturation']:.2f}",
        "1.00",
    ]
    assert found["`emoji-dmd2`"] == ["1", "12.3", "50 %", "1.25", "0.75", f"{row['updates']} (interrupted)"]
    assert found["teacher, 8 Heun steps"][0] == "15"
    assert found["teacher, 8 Heun steps"][3] == "1.00"
    assert found["teacher, 8 Heun steps, guidance 1.5"][0] == "30"  # each Heun call is two of the network
    assert found["`emoji-dmd2-gan`"][1:5] == ["not run"] * 4
    (tmp_path / "emoji.json").write_text(json.dumps(content))
    assert reached.one_step_emoji(tmp_path / "emoji.json") == "50 %; +25.0 % (interrupted)"
    again = lines(emoji.table(content, teacher | {"updates": teacher["updates"] + 1}))
    assert again["`emoji-dmd2`"][1] == "of an earlier recipe or teacher"
    assert again["teacher, 8 Heun steps"][3] == "not run"
    row["identity"] = row["identity"] | {"batch": 3}
    assert lines(emoji.table(content, teacher))["`emoji-dmd2`"][1] == "of an earlier recipe or teacher"
    (tmp_path / "emoji.json").write_text(json.dumps(content))
    assert reached.one_step_emoji(tmp_path / "emoji.json") == "not run"


def test_only_finished_runs_of_recipes_as_they_ship_have_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emoji, "identity_of", lambda run: emoji.today("emoji-dmd2"))

    def run(name: str, report: dict[str, Any] | None) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (folder / "report").mkdir(parents=True)
        (folder / "recipe.yaml").write_text(dump(load(name, ["train.seed=3"])))
        if report is not None:
            (folder / "report" / "results.json").write_text(json.dumps(report))
        return folder

    row = evaluated({"value": 2.0}, {"value": 0.75})
    told = emoji.row_of(run("emoji-dmd2", {"rows": [row]}), interrupted=True)
    assert (told["value"], told["found"], told["interrupted"]) == (2.0, 0.75, True)
    with pytest.raises(UserError, match="is a run of digits-dmd2; this table has recipes emoji-dmd2"):
        emoji.row_of(run("digits-dmd2", {"rows": [row]}), interrupted=False)
    for report in (None, {"rows": []}, {"rows": [evaluated({"value": 2.0}, None)]}):
        with pytest.raises(UserError, match=r"results\.json: tells no distance and no 'caption found among 100'"):
            emoji.row_of(run("emoji-dmd2", report), interrupted=False)
    monkeypatch.setattr(emoji, "identity_of", lambda run: {"teacher": "another"})
    with pytest.raises(UserError, match="was trained with another recipe or teacher than emoji-dmd2 has today"):
        emoji.row_of(run("emoji-dmd2", {"rows": [row]}), interrupted=False)


def evaluated(distance: dict[str, float], found: dict[str, float] | None) -> dict[str, Any]:
    row = read_json(assets() / "digits-dmd2.json")["rows"][-1]
    name = next(iter(row["metrics"]))
    return row | {"metrics": {name: row["metrics"][name] | distance} | ({emoji.FOUND: found} if found else {})}


def test_a_teacher_in_few_steps_is_what_the_reports_of_its_students_say(tmp_path: Path):
    """Its one call may do as well as many, which a table of students must not hide."""
    names = {"teacher, 1 step": 1, "teacher, 8 steps (best)": 8, "student, 4 steps": 4}
    metrics = {"FD (x)": {"value": 2.5, "standard_error": None}, emoji.FOUND: {"value": 0.5}}
    about = {"preset": "x", "preset_hash": "0", "extractor": "x", "number": 131, "metrics": metrics}
    rows = [Evaluation(name=name, steps=n, calls=n, **about).as_json() for name, n in names.items()]
    for run in (tmp_path / "a", tmp_path / "b"):
        (run / "report").mkdir(parents=True)
        (run / "report" / "results.json").write_text(json.dumps({"rows": rows[2:] if run.name == "a" else rows}))
    like = {"guidance": 1.0, "metric": "FD (x)", "samples": 131}
    told = {"measured": [like | {"heun_steps": 8}, like | {"heun_steps": 1, "guidance": 1.5}]}
    found = emoji.few_steps([tmp_path / "a", tmp_path / "b"], told)
    assert found == [{"heun_steps": 1, "guidance": 1.0, "value": 2.5, "retrieval": 0.5}]
    assert emoji.few_steps([tmp_path / "a"], told) == []
    told["measured"][0]["samples"] = 64
    assert emoji.few_steps([tmp_path / "b"], told) == []
