"""Bands of reference runs: made from logs, kept by healthy ones, left by others, refused for other settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fewstep.config import UserError
from fewstep.recipe.store import load
from fewstep.train.bands import PARTS, compared, differs, identity, make

OWN = {"batch": 64, "teacher": "3 files, 1.2 MB, abc", "recipe": "0123456789abcdef"}


def log(seed: int, count: int = 60, **changed: Callable[[float], float]) -> list[dict[str, Any]]:
    """Sixty records of a loss that falls and of a reading, each with some noise; a stage of 100 steps before."""

    def noise(i: int, k: int) -> float:
        return math.sin(1.7 * i + 12.9 * seed + k)

    own = {"dsm": lambda p: 2 - p, "samples/mean": lambda p: 0.0, **changed}
    rows = [{"done": 5 * i, "stage": 0, "dsm": 50.0} for i in range(1, 21)]
    for i in range(1, count + 1):
        values = {name: f(i / 60) + 0.05 * noise(i, k) for k, (name, f) in enumerate(own.items())}
        rows.append({"done": 100 + 5 * i, "stage": 1, "skips": 0, "seconds": 0.1, "lr/student": 1e-3, **values})
    return rows


def test_a_third_run_is_within_the_bands_of_two():
    expected = make([log(1), log(2)], OWN)
    assert (expected.runs, expected.batch) == (2, 64)
    assert expected.ends == tuple(range(30, 301, 30))
    assert sorted(expected.bands) == ["dsm", "samples/mean"]  # neither rates, counts nor seconds
    (found,) = compared(log(3), expected)
    assert (found.name, found.level) == ("as expected", "fine")
    assert found.sentence == "within the band of the 2 reference runs"
    (early,) = compared(log(3, count=7), expected)
    assert early.fine


def test_a_run_that_leaves_is_told_where_and_what():
    expected = make([log(1), log(2)], OWN)
    (found,) = compared(log(3, dsm=lambda p: 2 - p if p < 0.55 else 3.0), expected)
    assert (found.name, found.level) == ("dsm unexpected", "warn")
    assert found.sentence.startswith("dsm left the band of the 2 reference runs in updates 151 to 180: 2.967")
    assert found.value > found.line == expected.bands["dsm"].high[5]
    both = compared(log(3, dsm=lambda p: 2 - p if p < 0.55 else 0.1, **{"samples/mean": lambda p: -0.5}), expected)
    assert [v.name for v in both] == ["samples/mean unexpected", "dsm unexpected"]  # the earlier one first
    assert both[1].line == expected.bands["dsm"].low[5]
    (lost,) = compared(log(3, dsm=lambda p: math.nan), expected)
    assert lost.sentence.startswith("dsm left the band of the 2 reference runs in updates 1 to 30: nan")


def test_one_run_makes_a_band_and_short_ones_none():
    assert "the reference run" in compared(log(2), make([log(1)], OWN))[0].sentence
    with pytest.raises(UserError, match=f"bands need {2 * PARTS} records of the last stage from each run, one has 19"):
        make([log(1), log(2, count=19)], OWN)
    # Runs of other lengths: as far as the shortest goes.
    assert make([log(1), log(2, count=40)], OWN).ends[-1] == 200
    assert compared([], make([log(1)], OWN)) == []


def test_a_band_is_wider_than_its_records_by_half_their_distance_on_either_side():
    rows = [{"done": i, "stage": 0, "loss": 1.0 + (i % 2)} for i in range(1, 21)]
    band = make([rows], OWN).bands["loss"]
    assert set(zip(band.low, band.high, strict=True)) == {(0.5, 2.5)}


def test_bands_are_of_a_batch_a_teacher_and_settings():
    recipe = load("digits-dmd2")
    own = identity(recipe, {"teacher": "abc"})
    expected = replace(make([log(1)], OWN), **own)
    assert differs(expected, own) == ""
    assert differs(expected, identity(load("digits-dmd2", ["train.seed=3", "train.steps=50"]), {"teacher": "abc"})) == ""
    other = identity(load("digits-dmd2", ["train.batch=32"]), {"teacher": "abc"})
    assert differs(expected, other) == "they are of train.batch 64, this run has 32"
    assert differs(expected, identity(recipe, {"teacher": "abd"})) == "they are of another teacher (abc, here abd)"
    for setting in ("optim.critic.lr=2e-3", "method.guidance=2.0", "train.clip=1.0"):
        assert "other settings" in differs(expected, identity(load("digits-dmd2", [setting]), {"teacher": "abc"}))
    # A decay makes the rates depend on the length.
    assert identity(load("toy/dmd2"), {}) != identity(load("toy/dmd2", ["train.steps=50"]), {})
