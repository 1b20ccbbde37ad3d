"""Where a run was best: by its evaluations, else by its readings, within the last stage."""

from __future__ import annotations

from typing import Any

import pytest

from fewstep.train.lines import SHIFT, TIE
from fewstep.train.peak import peak

NAME = "FD (house-digits)"


def row(done: int, mean: float | None = None, stage: int = 1) -> dict[str, Any]:
    return {"done": done, "stage": stage, "loss": 1.0} | ({} if mean is None else {"samples/mean": mean})


def measured(done: int, value: float | None) -> dict[str, Any]:
    return {"done": done, "evaluation": {"class accuracy": {"value": 0.9}, NAME: {"value": value}}}


def test_a_record_without_its_step_is_passed_over():
    rows = [row(10, 0.7), row(20, 0.1)]
    assert peak([{"stage": 1, "samples/mean": 0.0}, *rows, {"evaluation": {NAME: {"value": 1.0}}}]) == peak(rows)


def test_by_the_readings_the_worse_of_two_in_a_row():
    before = [row(d, 0.0, stage=0) for d in (10, 20, 30)]
    rows = [row(40, 0.7), row(50, 0.35), row(60, 0.5), row(65), row(70, 0.4), row(80, 0.0)]
    rows += [row(90, -0.07), row(100, -0.7)]
    found = peak([*before, *rows])
    assert found is not None
    assert (found.done, found.total, found.by) == (90, 100, "readings of samples")
    assert str(found) == "best at step 90 of 100, by readings of samples (0.2)"


def test_of_moments_as_good_but_for_chance_the_last_is_the_best():
    found = peak([row(10, 0.0), row(20, 0.0), row(30, 0.0), row(40, 0.9 * TIE * SHIFT), row(50, 1.1 * TIE * SHIFT)])
    assert found is not None
    assert (found.done, found.value) == (40, pytest.approx(0.9 * TIE))


def test_a_lone_first_reading_is_no_moment_to_compare_with():
    found = peak([row(10, 0.0), row(20, 0.9 * SHIFT), row(30, 0.5 * SHIFT), row(40, 0.5 * SHIFT)])
    assert found is not None
    assert (found.done, found.value) == (40, pytest.approx(0.5))


def test_by_the_evaluations_where_there_are_several():
    rows = [row(40, 0.0), measured(40, 9.0), row(50, 0.5), measured(50, 2.5), row(60, 0.6), measured(60, None)]
    found = peak(rows)
    assert found is not None
    assert (found.done, found.total, found.by, found.value) == (50, 60, NAME, 2.5)
    found = peak([measured(5, 0.1), row(5, stage=0), *rows])  # of the stage before
    assert found is not None
    assert found.done == 50


def test_one_evaluation_or_none_leaves_the_readings_and_nothing_is_nothing():
    found = peak([row(40, 0.1), row(50, 0.0), measured(50, 2.0)])
    assert found is not None
    assert found.by == "readings of samples"
    assert peak([]) is None
    assert peak([row(10), row(20)]) is None
