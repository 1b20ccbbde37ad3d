"""False alarms are counted over whole runs of shipped recipes, and over nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewstep.bench.alarms import main, table, whole
from fewstep.config import UserError
from fewstep.recipe.store import load
from fewstep.train.claim import keep_recipe

TOTAL = 3400
"""Updates of toy/lcm, 3,000 of them its teacher's."""


def run(folder: Path, *settings: str, end: int = TOTAL, dark: int = TOTAL, old: bool = False) -> Path:
    """A run of toy/lcm whose samples are as the reference's until `dark`; old: an earlier fewstep."""
    folder.mkdir()
    more = {} if old else {"samples/offset": 0.0}
    keep_recipe(load("toy/lcm", settings), folder)
    rows = [
        {"done": d, "stage": int(d > 3000), "skips": 0, "samples/mean": -0.9 * (d > dark), **more}
        for d in range(10, end + 1, 10)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_a_whole_run_tells_its_alarms_and_when(tmp_path: Path):
    quiet, loud = whole(run(tmp_path / "a")), whole(run(tmp_path / "b", "train.seed=3", dark=3200))
    assert (quiet.recipe, quiet.updates, quiet.readings, quiet.alarms) == ("toy/lcm", TOTAL, TOTAL // 10, {})
    assert loud.alarms == {"darkening": 3220}
    log = tmp_path / "a" / "log.jsonl"
    log.write_text(log.read_text() + json.dumps({"done": 3100, "guard": {"alarm": "samples alike"}}) + "\n")
    assert whole(tmp_path / "a").alarms == {"samples alike": 3100}


@pytest.mark.parametrize(
    ("settings", "end", "old", "said"),
    [
        ((), TOTAL - 10, False, "ends at 3390 of 3400"),
        (("train.batch=64",), TOTAL, False, "has changed train.batch of toy/lcm"),
        (("train.steps=20",), TOTAL, False, "has changed train.steps of toy/lcm"),
        (("train.guard=off", "train.readings_every=99"), TOTAL, False, "has changed train.guard, train.readings_every"),
        ((), TOTAL, True, "has samples/mean without samples/offset"),
    ],
)
def test_what_is_no_whole_run_of_a_shipped_recipe_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: tuple[str, ...], end: int, old: bool, said: str
):
    with pytest.raises(UserError, match=said):
        whole(run(tmp_path / "a", *settings, end=end, old=old))
    main([str(tmp_path / "a"), "--out", str(tmp_path / "alarms.jsonl")])
    assert "left out" in capsys.readouterr().out
    assert not (tmp_path / "alarms.jsonl").exists()


def test_a_row_replaces_its_recipes_and_the_table_names_alarms_and_what_was_not_run(tmp_path: Path):
    out = tmp_path / "alarms.jsonl"
    main([str(run(tmp_path / "a", dark=3200)), "--out", str(out)])
    assert "in 1: `toy/lcm` (darkening at 3220)" in table(out)
    main([str(run(tmp_path / "b")), "--out", str(out)])
    assert len(out.read_text().splitlines()) == 1
    text = table(out)
    assert "whole runs of 1 of the" in text
    assert "alarms in 0." in text
    assert "`toy/dmd2`" in text.partition("No whole run")[2]
    assert "`toy/lcm`" not in text.partition("No whole run")[2]
