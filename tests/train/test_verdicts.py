"""Verdicts on samples drawn beside the training: each failure fires in time, and nothing fires on the way up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.train.lines import SAMPLES
from fewstep.train.log import read_log
from fewstep.train.verdicts import RECENT, Course, alarms, last_stage, verdicts

GOOD = dict.fromkeys(SAMPLES, 1.0) | {"samples/mean": 0.0}


def log(count: int = 40, **changed: Callable[[int], float]) -> list[dict[str, Any]]:
    """A log of one record every 20 steps, samples as the reference but where `changed` says (by name, of the record)."""
    own = {f"samples/{k}": f for k, f in changed.items()}
    return [
        {"done": 20 * i, "stage": 0, "skips": 0, **GOOD, **{k: f(i) for k, f in own.items()}} for i in range(1, count + 1)
    ]


def after(start: int, good: float, bad: float) -> Callable[[int], float]:
    return lambda i: good if i <= start else bad


def test_samples_as_the_reference_are_fine_by_every_reading():
    found = verdicts(log())
    assert [v.name for v in found] == [*(r.fine for r in SAMPLES.values()), "numerics"]
    assert all(v.level == "fine" and v.fine and not v.remedy for v in found)
    assert alarms(log()) == {}


@pytest.mark.parametrize(
    ("reading", "good", "bad", "name"),
    [
        ("mean", 0.0, -0.5, "darkening"),
        ("mean", 0.0, 0.5, "brightening"),
        ("contrast", 1.0, 0.6, "losing contrast"),
        ("contrast", 1.0, 1.5, "contrast too high"),
        ("saturation", 1.0, 0.5, "colours fading"),
        ("saturation", 1.0, 2.0, "colours too strong"),
        ("grid", 1.0, 9.0, "grid artefacts"),
        ("spread", 1.0, 0.3, "samples alike"),
        ("contrast", 1.0, math.nan, "not finite"),
        ("spread", 1.0, math.inf, "not finite"),
    ],
)
def test_what_leaves_the_reference_is_an_alarm_within_two_readings(reading: str, good: float, bad: float, name: str):
    rows = log(**{reading: after(20, good, bad)})
    # The second reading, so within 40 steps; what is no number is one at once.
    assert alarms(rows) == {name: 440 if math.isfinite(bad) else 420}
    found = [v for v in verdicts(rows) if not v.fine]
    assert [(v.name, v.level) for v in found] == [(name, "alarm")]
    assert found[0].remedy
    if math.isfinite(bad):
        assert found[0].value == bad
        assert SAMPLES[f"samples/{reading}"].badness(found[0].line) == pytest.approx(1)
        assert min(bad, good) < found[0].line < max(bad, good)


def test_one_reading_beyond_its_line_is_none_and_one_that_was_near_is_no_arrival():
    assert alarms(log(mean=lambda i: -0.9 if i % 5 == 0 else 0.0)) == {}
    # On its way up a student may be near once and not the next time (digits-dmd2 at batch 16: .21, .8, .55).
    assert alarms(log(spread=lambda i: {1: 0.21, 2: 0.8, 3: 0.55, 4: 0.58}.get(i, 0.9))) == {}
    # What is near from the first reading on need not come near again.
    assert alarms(log(mean=lambda i: 0.0 if i == 1 else -0.9)) == {"darkening": 60}


def test_a_student_on_its_way_is_no_alarm_and_one_that_never_came_is_a_warning():
    """From a blurred mean, as a student that begins with its teacher's weights: contrast and spread rise to the line."""
    rows = log(contrast=lambda i: min(1.0, 0.2 + 0.03 * i), spread=lambda i: min(0.95, 0.05 + 0.03 * i))
    assert alarms(rows) == {}
    assert all(v.fine for v in verdicts(rows))
    never = log(spread=lambda i: 0.3 + 0.001 * i)
    assert alarms(never) == {}
    (found,) = [v for v in verdicts(never) if not v.fine]
    assert (found.name, found.level) == ("samples alike", "warn")
    assert "never were much nearer" in found.sentence


def test_more_spread_than_the_reference_and_less_of_a_grid_are_fine():
    rows = log(spread=after(20, 1.0, 3.0), grid=after(20, 1.0, 0.01))
    assert alarms(rows) == {}


def test_the_guards_course_and_the_whole_log_say_the_same():
    rows = log(mean=after(20, 0.0, -0.5), spread=after(25, 1.0, 0.2))
    rows = [{**r, "skips": max(0, i - 30)} for i, r in enumerate(rows)]
    course = Course()
    for n, row in enumerate(rows, 1):
        course.add(row)
        assert course.verdicts() == verdicts(rows[:n])
    assert [v.name for v in course.alarms()] == ["darkening", "samples alike", "non-finite gradients"]


def test_drift_is_that_of_the_worst_of_the_last_readings():
    course = Course(log(5))
    assert course.drift() == 0
    assert Course().drift() is None
    course.add({"done": 120, "stage": 0, **GOOD, "samples/mean": -0.7})
    assert course.drift() == pytest.approx(2)  # at once, while nothing is said yet
    assert course.alarms() == []
    for done in range(140, 140 + 20 * RECENT, 20):
        course.add({"done": done, "stage": 0, **GOOD})
    assert course.drift() == 0
    course.add({"done": 300, "stage": 0, **GOOD, "samples/spread": 0.6, "samples/contrast": 1.35})
    assert course.drift() == pytest.approx(2**0.5)


def test_records_without_samples_and_of_earlier_stages_do_not_count(tmp_path: Path):
    old = [{"done": i, "stage": 0, **GOOD, "samples/mean": 3.0} for i in range(20)]
    rows = [*old, *({"done": 20 + i, "stage": 1, "loss": 1.0} for i in range(20))]
    assert verdicts(rows) == []
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*old, *log(mean=after(9, 0, math.nan))]))
    assert "not finite" in alarms(last_stage(read_log(tmp_path / "log.jsonl")))


@pytest.mark.parametrize("before", [0.0, 0.2, 0.45])
def test_the_farther_a_mean_jumps_the_surer_it_is_an_alarm(before: float):
    """Where it moves away, at its line and beyond: nothing in between that is none."""

    def alarm(lines: float) -> bool:
        offset = after(30, before * 0.35, lines * 0.35)
        rows = [{**r, "samples/mean": -offset(i), "samples/offset": -offset(i)} for i, r in enumerate(log(32), 1)]
        return "darkening" in alarms(rows)

    found = [alarm(lines / 50) for lines in range(int(50 * before), 150)]
    assert found == sorted(found)
    assert found[-1]
    assert not found[0]


def test_a_leap_is_an_alarm_while_it_lasts_and_told_of_afterwards():
    rows = log()
    rows[20] |= {"leap/mean": -0.8}
    course = Course(rows[:21])
    assert [(v.name, v.level, v.value) for v in course.verdicts() if not v.fine] == [("sudden change", "alarm", -0.8)]
    assert alarms(rows) == {"sudden change": 420}
    (told,) = [v for v in verdicts(rows) if not v.fine]
    assert (told.name, told.level) == ("sudden change", "warn")
    assert "-0.80 of their standard deviations at step 420" in told.sentence
    assert Course(rows).alarms() == []


def test_copies_in_the_methods_own_batches_are_an_alarm_at_the_second_record_and_smaller_ones_are_none():
    def rows(bad: float) -> list[dict[str, Any]]:
        spread = after(20, 0.3, bad)
        return [r | {"health/diversity": spread(i)} for i, r in enumerate(log(), 1)]

    def by_the_guard(bad: float) -> dict[str, int]:
        course, found = Course(), {}
        for record in rows(bad):
            course.add(record)
            for v in course.alarms():
                found.setdefault(v.name, record["done"])
        return found

    assert by_the_guard(1e-8) == {"copies in a batch": 440}
    assert by_the_guard(0.01) == {}
    assert "noise" in next(v for v in verdicts(rows(1e-8)) if v.name == "copies in a batch").remedy


def test_one_batch_of_copies_is_no_alarm():
    course = Course([{"done": 20 * i, "health/diversity": 1e-8 if i == 7 else 0.3} for i in range(1, 10)])
    assert course.alarms() == []


def test_far_beyond_its_line_one_reading_is_enough_but_not_for_a_student_on_its_way():
    assert alarms(log(mean=after(20, 0.0, -1.1))) == {"darkening": 420}
    assert alarms(log(spread=after(20, 1.0, 0.2))) == {"samples alike": 420}
    assert alarms(log(spread=lambda i: 0.01 * i, contrast=lambda i: 0.025 * i)) == {}
