"""The files of a comparison, as a kill, an editor or somebody else left them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.commands.compare.kept import COSTS, claimed, message_of, read_evaluations, result_of, steps_of
from fewstep.commands.compare.spent import account_of
from fewstep.config import UserError
from fewstep.files import LOCK, read_mark, write_mark

CONTENT = {"budget": "updates=3", "settings": [], "steps": [], "evaluation": {"metric": "energy", "teacher_steps": [1]}}
ROW = {
    "name": "r", "preset": "p", "preset_hash": "0", "extractor": "x", "number": 4, "steps": 1, "latency": [],
    "metrics": {"energy distance": {"value": 1.0}},
}  # fmt: skip
DEEP = "[" * 100_000


def compared(out: Path, **more: Any) -> None:
    with claimed(out, True, CONTENT | more):
        pass


def test_a_comparison_has_a_mark_and_one_process(tmp_path: Path):
    out = tmp_path / "c"
    with claimed(out, False, CONTENT):
        assert (read_mark(out) or {})["kind"] == "comparison"
        with pytest.raises(UserError, match=r"is being compared in by process \d+; wait for it or stop it first"):
            compared(out)
    with pytest.raises(UserError, match="holds a comparison; continue it with --resume"), claimed(out, False, CONTENT):
        pass
    compared(out)
    with pytest.raises(UserError, match=r"another budget, so it cannot be continued \(budget: updates=3 -> calls=5\)"):
        compared(out, budget="calls=5")


def test_a_folder_that_only_looks_like_a_comparison_is_not_one(tmp_path: Path):
    out = tmp_path / "c"
    out.mkdir()
    (out / "compare.json").write_text(json.dumps(CONTENT))
    with pytest.raises(UserError, match="is not empty and no comparison that fewstep made; choose another folder"):
        compared(out)
    assert [p.name for p in out.iterdir()] == ["compare.json"]
    other = tmp_path / "run"
    other.mkdir()
    write_mark(other, "run directory")
    with pytest.raises(UserError, match="is a run directory that fewstep made and no comparison"):
        compared(other)
    new = tmp_path / "killed before its mark"
    new.mkdir()
    (new / LOCK).write_text("1\n")
    compared(new)


BROKEN = [json.dumps(CONTENT | {key: value}) for key in CONTENT for value in (None, 3)]


@pytest.mark.parametrize("text", ["{}", "[]", "3", "{", DEEP, "", "null", *BROKEN])
def test_a_damaged_stamp_is_named(tmp_path: Path, text: str):
    compared(tmp_path / "c")
    (tmp_path / "c" / "compare.json").write_text(text)
    with pytest.raises(UserError, match=r"c/compare\.json: "):
        compared(tmp_path / "c")


def test_a_result_is_whole_or_none(tmp_path: Path):
    good = {"method": "dmd2", "rows": [ROW], **dict.fromkeys(COSTS, 1)}

    def kept(content: Any, teacher: bool = False) -> Any:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "result.json").write_text(text)
        return result_of(tmp_path, teacher)

    assert result_of(tmp_path, False) is None
    assert kept(good) == good
    assert kept({"rows": [ROW]}, teacher=True) == {"rows": [ROW]}
    assert kept({"rows": [ROW]}) is None
    for text in ("", "{", "[]", DEEP, "null"):
        assert kept(text) is None
    for key in ("method", "rows", *COSTS):
        for value in (None, "x", [], [3], {}, True):
            assert kept(good | {key: value}) is None or (key, value) == ("method", "x"), (key, value)
    for key in ("name", "number", "steps", "metrics", "latency"):
        for value in (None, 3.5, {"energy distance": 3}, {"energy distance": {"value": None}}, {}, "x"):
            if (key, value) not in (("name", "x"), ("latency", {})):
                assert kept(good | {"rows": [ROW | {key: value}]}) is None, (key, value)


def test_other_files_of_a_run_are_whole_or_none(tmp_path: Path):
    lengths = tmp_path / "lengths.json"
    for text in (
        "{}",
        "[]",
        '{"recipe": "a", "steps": 3}',
        '{"recipe": "a", "steps": ["x"]}',
        '{"recipe": "b", "steps": [3]}',
    ):
        lengths.write_text(text)
        assert steps_of(lengths, "a", 1) is None
    lengths.write_text('{"recipe": "a", "steps": [3]}')
    assert steps_of(lengths, "a", 1) == [3]
    assert steps_of(lengths, "a", 2) is None
    for text in ("", "[]", "{}", '{"message": 3}', '{"message": ""}'):
        (tmp_path / "failure.json").write_text(text)
        assert message_of(tmp_path) in ("left no result", "3")
    account = b'{"done": 3, "seconds": 1.5}\n[1]\n{"done": "x"}\n\xff\n{"more": 1}\n{"done": 5}\n{"do'
    (tmp_path / "account.jsonl").write_bytes(account)
    assert [e.done for e in account_of(tmp_path)] == [3, 5]
    (tmp_path / "scores.npz").write_bytes(b"PK\3\4 cut")
    with pytest.raises(UserError, match=r"scores\.npz: cannot be read: .*; delete .*result\.json to measure it again"):
        read_evaluations(tmp_path, {"rows": [ROW]})
