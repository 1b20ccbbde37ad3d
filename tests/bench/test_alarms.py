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


def run(folder: Path, *settings: str, end: int = TOTAL, dark: int = TOTAL) -> Path:
    """A run of toy/lcm whose samples are as the reference's until `dark`."""
    folder.mkdir()
    keep_recipe(load("toy/lcm", settings), folder)
    rows = [
        {"done": d, "stage": int(d > 3000), "skips": 0, "samples/mean": -0.9 * (d > dark), "samples/contrast": 1.0}
        for d in range(10, end + 1, 10)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_a_whole_run_tells_its_alarms_and_when(tmp_path: Path):
    quiet, loud = whole(run(tmp_path / "a")), whole(run(tmp_path / "b", "train.seed=3", dark=3200))
    assert (quiet.recipe, quiet.updates, quiet.readings, quiet.alarms) == ("toy/lcm", TOTAL, TOTAL // 10, {})
    assert loud.alarms == {"darkening": 3220}


@pytest.mark.parametrize(
    ("settings", "end", "said"),
    [
        ((), TOTAL - 10, "its log ends at 3390 of 3400"),
        (("train.batch=64",), TOTAL, "has changed toy/lcm by train.batch=64"),
    ],
)
def test_what_is_no_whole_run_of_a_shipped_recipe_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: tuple[str, ...], end: int, said: str
):
    with pytest.raises(UserError, match=said):
        whole(run(tmp_path / "a", *settings, end=end))
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
    assert "`toy/dmd2`" in text.partition("Not run whole")[2]
    assert "`toy/lcm`" not in text.partition("Not run whole")[2]
