"""A run that was killed and continued is the run that was not, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import contents, names, python, records, same

EXPECTED = {
    "student",
    "critic",
    "discriminator",
    "ema_0.9",
    "ema_0.99",
    "optim-student",
    "optim-critic+discriminator",
    "progress",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    folder = tmp_path_factory.mktemp("runs")
    code = "import sys, pathlib, tiny_runs; tiny_runs.drive_random_kills(pathlib.Path(sys.argv[1]), seed=7)"
    printed = python(code, str(folder)).stdout
    return folder, json.loads(printed.splitlines()[-1])["log lines at each kill"]


def test_kill_at_random_moments_changes_no_bit(runs: tuple[Path, list[int]]):
    folder, kills = runs
    assert sum(0 < lines < 40 for lines in kills) >= 1, kills
    reference, other = (folder / n / "checkpoints" for n in ("reference", "killed"))
    assert names(reference) == names(other) == ["step-00000196", "step-00000200"]
    for step in names(reference):
        a, b = contents(reference / step), contents(other / step)
        assert set(a) == EXPECTED
        a["progress"]["meter"].pop("seconds", None)
        b["progress"]["meter"].pop("seconds", None)
        assert same(a, b) == []
    assert contents(reference / "step-00000200")["progress"]["optim"] == {
        "student": {"updates": 140, "skipped": 0},
        "critic+discriminator": {"updates": 280, "skipped": 0},
    }


def test_the_log_is_the_same_but_for_the_clock(runs: tuple[Path, list[int]]):
    folder, _ = runs
    reference = records(folder / "reference")
    assert [r["done"] for r in reference] == list(range(5, 201, 5))
    assert {"match", "gan", "dsm", "discriminator", "grad_norm/critic+discriminator"} <= set(reference[-1])
    assert same(reference, records(folder / "killed")) == []


def test_kill_while_a_checkpoint_or_a_log_line_is_written(runs: tuple[Path, list[int]], tmp_path: Path):
    folder, _ = runs
    code = "import sys, pathlib, tiny_runs; tiny_runs.drive_kill_points(pathlib.Path(sys.argv[1]))"
    left = {}
    for line in python(code, str(tmp_path)).stdout.splitlines():
        left.update(json.loads(line))
    # The kill came where it was meant to: a temporary folder, or a checkpoint being dropped, was left behind.
    assert sum(".tmp" in n for n in left["optimizer_half_written"]) == 1
    assert sum(".tmp" in n for n in left["before_the_rename"]) == 1
    assert len(left["while_dropping_old_ones"]) == 3
    expected = contents(folder / "reference" / "checkpoints" / "step-00000200")
    for point in left:
        assert names(tmp_path / point / "checkpoints") == ["step-00000196", "step-00000200"]
        assert same(expected, contents(tmp_path / point / "checkpoints" / "step-00000200")) == []
        assert same(records(folder / "reference"), records(tmp_path / point)) == []
