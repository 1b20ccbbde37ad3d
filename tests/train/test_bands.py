"""Bands of reference runs: made from logs, kept by healthy ones, left by others, refused for other settings."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewstep.config import UserError
from fewstep.recipe.store import load
from fewstep.train.bands import PARTS, compared, differs, identity, make

OWN = {"batch": 64, "teacher": "3 files, 1.2 MB, abc", "data": "", "recipe": "0123456789abcdef"}


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


def rows(**columns: list[float | None]) -> list[dict[str, Any]]:
    """Forty records, four a part, of one stage; None where a record lacks the reading."""
    return [{"done": i + 1, "stage": 0} | {k: v[i] for k, v in columns.items() if v[i] is not None} for i in range(40)]


def test_the_logs_that_bands_are_of_are_within_them():
    rest = random.Random(4)
    logs = []
    for seed in range(3):
        scales = {f"scale {k}": [10.0**k * (rest.random() - 0.3) for _ in range(40)] for k in (-9, -1, 0, 5)}
        still = {"third": [1 / 3] * 40, "below": [-2 / 3] * 40, "none": [0.0] * 40, "samples/mean": [0.0] * 40}
        once = {"samples/spread": [0.925512345 if i % 4 == seed else None for i in range(40)]}
        lost = {"lost": [math.nan if i == 17 else 1.0 for i in range(40)]}
        logs.append(rows(**scales, **still, **once, **lost))
    for chosen in (logs, *([log] for log in logs)):
        expected = make(chosen, OWN)
        assert "lost" not in expected.bands  # no range holds what is no number
        assert {"third", "none", "samples/mean", "samples/spread"} <= set(expected.bands)
        for log_ in chosen:
            for end in (5, 13, 40):
                assert [v.name for v in compared(log_[:end], expected)] == ["as expected"]


def test_equal_records_have_a_band_of_a_twentieth_of_their_value():
    expected = make([rows(third=[1 / 3] * 40, below=[-20.0] * 40, **{"samples/mean": [0.0] * 40})], OWN)
    assert set(zip(expected.bands["third"].low, expected.bands["third"].high, strict=True)) == {(0.3249, 0.3417)}
    assert (expected.bands["below"].low[0], expected.bands["below"].high[0]) == (-20.5, -19.5)
    # In deviations: a twentieth of one, where 0 is what chance explains.
    assert (expected.bands["samples/mean"].low[0], expected.bands["samples/mean"].high[0]) == (-0.025, 0.025)
    (near,) = compared(rows(third=[0.34] * 40), expected)
    assert near.fine
    (far,) = compared(rows(third=[0.36] * 40), expected)
    assert far.sentence.endswith("in updates 1 to 4: 0.36, expected 0.3249 to 0.3417")


def test_a_part_with_one_record_takes_those_beside_it():
    values = [float(i) if i % 4 == 0 else None for i in range(40)]  # 0, 4, 8, ... one a part
    band = make([rows(spread=values)], OWN).bands["spread"]
    assert (band.low[0], band.high[0]) == (-2.0, 6.0)  # of 0 and 4
    assert (band.low[5], band.high[5]) == (12.0, 28.0)  # of 16, 20 and 24
    values[20] = None
    assert make([rows(spread=values, loss=[1.0] * 40)], OWN).bands.keys() == {"loss"}


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
    for setting in ("evaluate.guidance=2.0", "data.held_out=0.1", "teacher.dtype=bf16"):
        assert "other settings" in differs(expected, identity(load("digits-dmd2", [setting]), {"teacher": "abc"}))
    # A decay makes the rates depend on the length.
    assert identity(load("toy/dmd2"), {}) != identity(load("toy/dmd2", ["train.steps=50"]), {})


def test_bands_are_of_the_data_wherever_it_lies(tmp_path: Path):
    def own(*settings: str, **origins: str) -> dict[str, Any]:
        data = f"data={{name: images, size: 8, path: {tmp_path}}}"
        return identity(load("digits-dmd2", [data, "evaluate=null", *settings]), {"teacher": "abc", **origins})

    here = own(data="9 files, 1 MB, abc", encoder="e")
    expected = replace(make([log(1)], OWN), **here)
    assert (
        differs(expected, own(f"data.path={tmp_path / 'there'}", "teacher.path=x", data=here["data"], encoder="e")) == ""
    )
    assert differs(expected, own(data="8 files, 1 MB, abd", encoder="e")) == (
        "they are of other data (9 files, 1 MB, abc, here 8 files, 1 MB, abd)"
    )
    assert "other settings" in differs(expected, own("data.flip=true", data=here["data"], encoder="e"))
    assert "other settings" in differs(expected, own(data=here["data"], encoder="another"))
    # A function has no files: its numbers tell.
    assert identity(load("toy/dmd2"), {}) != identity(load("toy/dmd2", ["data.radius=2.0", "teacher.radius=2.0"]), {})


def test_where_a_reward_is_trained_on_bands_are_of_the_features_too():
    def own(recipe: str, metric: str) -> dict[str, Any]:
        return identity(load(recipe, [f"evaluate.metric={metric}"]), {})

    assert own("toy/dmd2-ink", "energy") != own("toy/dmd2-ink", "fd")
    assert own("toy/dmd2", "energy") == own("toy/dmd2", "fd")
