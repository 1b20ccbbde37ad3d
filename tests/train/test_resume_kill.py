"""A run that was killed and continued is the run that was not, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import apart
from tiny_runs import THIRD, contents, drive_kills, names, records, same

from fewstep.train.guard import best_of

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
Runs = tuple[Path, list[int], dict[str, list[str]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    return folder, *driven(folder, THIRD)


def driven(folder: Path, settings: Sequence[str] = (), seed: int = 7) -> tuple[list[int], dict[str, list[str]]]:
    """Log lines at each random kill, and the checkpoint folders left behind at each kill point, by one driver."""
    left: dict[str, Any] = {}
    for line in apart(drive_kills, folder, seed, *settings).splitlines():
        left.update(json.loads(line))
    return left.pop("log lines at each kill"), left


def check_random_kills(folder: Path, kills: list[int], last: tuple[int, int], updates: int) -> None:
    assert sum(0 < lines < last[1] / 5 for lines in kills) >= 1, kills
    reference, other = (folder / n / "checkpoints" for n in ("reference", "killed"))
    assert names(reference) == names(other)
    assert names(reference)[-2:] == [f"step-{n:08}" for n in last]
    best = best_of(reference)
    assert best is not None
    assert names(reference) == sorted({best.name, *names(reference)[-2:]})  # which may be one of the newest
    for step in names(reference):
        a, b = contents(reference / step), contents(other / step)
        assert set(a) == EXPECTED
        a["progress"]["meter"].pop("seconds", None)
        b["progress"]["meter"].pop("seconds", None)
        assert same(a, b) == []
    assert contents(reference / f"step-{last[1]:08}")["progress"]["optim"] == {
        "student": {"updates": updates, "skipped": 0},
        "critic+discriminator": {"updates": 2 * updates, "skipped": 0},
    }


def check_kill_points(folder: Path, left: dict[str, list[str]], last: tuple[int, int]) -> None:
    # The kill came where it was meant to: a temporary folder, or a checkpoint being dropped, was left behind.
    assert sum(".tmp" in n for n in left["optimizer_half_written"]) == 1
    assert sum(".tmp" in n for n in left["before_the_rename"]) == 1
    assert sum(n.endswith(".old.tmp") for n in left["while_dropping_old_ones"]) == 1
    end = f"step-{last[1]:08}"
    expected = contents(folder / "reference" / "checkpoints" / end)
    assert len(left) == 4
    for point in left:
        assert names(folder / point / "checkpoints") == names(folder / "reference" / "checkpoints")
        assert same(expected, contents(folder / point / "checkpoints" / end)) == []
        assert same(records(folder / "reference"), records(folder / point)) == []


def test_kill_at_random_moments_changes_no_bit(runs: Runs):
    folder, kills, _ = runs
    check_random_kills(folder, kills, (63, 65), 45)


def test_the_log_is_the_same_but_for_the_clock(runs: Runs):
    folder, _, _ = runs
    reference = records(folder / "reference")
    assert [r["done"] for r in reference] == list(range(5, 66, 5))
    assert {"match", "gan", "dsm", "discriminator", "grad_norm/critic+discriminator"} <= set(reference[-1])
    assert same(reference, records(folder / "killed")) == []


def test_kill_while_a_checkpoint_or_a_log_line_is_written(runs: Runs):
    folder, _, left = runs
    check_kill_points(folder, left, (63, 65))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
def test_kills_of_a_run_of_twice_the_length(tmp_path: Path, seed: int):
    kills, left = driven(tmp_path, seed=seed)
    check_random_kills(tmp_path, kills, (196, 200), 140)
    check_kill_points(tmp_path, left, (196, 200))
