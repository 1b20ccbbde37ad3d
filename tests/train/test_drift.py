"""A method's own samples that drift are told of before drawn ones are beyond their line; a student on its way is not."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from collapsing import start

from fewstep.train.drift import BLOCK, ERRORS, Drift, heading
from fewstep.train.lines import SAMPLES, SHIFT
from fewstep.train.pulse import KEYS
from fewstep.train.track import GAP, LEAVE, NOISE, RECENT, SETTLED, settled_at
from fewstep.train.verdicts import Course

BEFORE = SETTLED + GAP
DEVIATION = 2.0
LINE = SHIFT * DEVIATION
Left = tuple[float, float] | None


def row(done: int, lines: float, error: float = 0.001, **more: float) -> dict[str, Any]:
    """A record whose samples' mean is so many lines from 0."""
    own = dict(zip(KEYS[:3], (lines * LINE, error, DEVIATION), strict=True))
    return {"done": done, "stage": 0, "skips": 0, **own, **more}


def left(means: Iterable[float], every: int = BLOCK, error: float = 0.001) -> Left:
    drift = Drift()
    for i, lines in enumerate([0.0, *means]):
        drift.add(row(every * i, lines, error))
    return drift.left()


def test_two_blocks_beyond_the_room_have_left_and_one_has_not():
    still = [0.3] * BEFORE
    assert left([*still, 0.3, 0.31 + LEAVE]) is None
    assert left([*still, 0.29 + LEAVE, 0.4 + LEAVE]) is None
    assert left([*still, 0.31 + LEAVE, 0.4 + LEAVE]) == pytest.approx(((LEAVE + 0.01) * SHIFT, LEAVE * SHIFT))
    assert left([*still, 0.29 - LEAVE, 0.2 - LEAVE]) == pytest.approx((-(LEAVE + 0.01) * SHIFT, -LEAVE * SHIFT))
    assert left([*still, 0.31 + LEAVE, 0.29 - LEAVE]) is None
    assert left([*still[1:], 0.31 + LEAVE, 0.31 + LEAVE]) is None  # too few to know where they have been


def test_the_room_grows_with_the_noise_before_and_with_the_samples_own_error():
    noisy = [0.1 * (-1) ** i for i in range(SETTLED)] + [0.0] * GAP
    room = NOISE * settled_at(noisy[:SETTLED])[1]
    assert room > LEAVE
    assert left([*noisy, 0.99 * room, 0.99 * room]) is None
    assert left([*noisy, 1.01 * room, 1.01 * room]) is not None
    error = 2 * LEAVE * LINE / ERRORS * math.sqrt(BLOCK)
    still = [0.0] * BEFORE
    assert left([*still, 1.99 * LEAVE, 1.99 * LEAVE], error=error) is None
    assert left([*still, 2.01 * LEAVE, 2.01 * LEAVE], error=error) is not None


@pytest.mark.parametrize("every", [1, 5, 10])
def test_records_of_fewer_updates_are_taken_together(every: int):
    """However often the log is written, the same updates tell."""

    def at(done: float) -> float:
        return 0.006 * max(0.0, done - 10 * BEFORE)

    drift, told = Drift(), []
    for done in range(0, 10 * BEFORE + 101, every):
        drift.add(row(done, at(done)))
        if drift.left() is not None:
            told.append(done)
    # A mean of ten updates lies up to half of them behind the record of the last one.
    assert 10 * BEFORE + 40 <= told[0] <= 10 * BEFORE + 60


def test_records_of_unequal_length_count_by_their_updates():
    drift = Drift()
    for i in range(BEFORE + 1):
        drift.add(row(10 * i, 0.0))
    done = 10 * BEFORE
    for _ in range(RECENT):
        drift.add(row(done + 1, 5.0))  # a leap's record, of one update
        drift.add(row(done := done + 10, 0.0))
    (value, _) = drift.left() or (math.nan, 0.0)
    assert value == pytest.approx(0.5 * SHIFT)


@pytest.mark.parametrize("rate", [0.01, 0.1, 1.0])
def test_a_student_on_its_way_evenly_or_ever_slower_has_not_left(rate: float):
    def told(mean: Callable[[int], float]) -> int:
        drift, count = Drift(), 0
        for i in range(1, 200):
            drift.add(row(10 * i, mean(i)))
            count += drift.left() is not None
        return count

    assert told(lambda i: rate * i) == 0
    assert told(lambda i: 5 * math.exp(-rate * i)) == 0
    assert told(lambda i: rate * i**2) <= 2  # a warm-up of the rate


def test_where_a_course_is_heading_is_the_line_of_least_squares():
    values = [3.0 + 0.5 * i for i in range(BEFORE + RECENT)]
    assert heading(values) == pytest.approx(values[-RECENT:])
    rng = random.Random(0)
    noisy = [rng.gauss(0.0, 1.0) for _ in range(BEFORE + RECENT)]
    x = list(range(SETTLED))
    slope, mean = statistics.linear_regression(x, noisy[:SETTLED])
    assert heading(noisy) == pytest.approx([mean + slope * i for i in range(BEFORE, BEFORE + RECENT)])


@pytest.mark.parametrize(("rho", "wide"), [(0.0, 0.03), (0.0, 0.1), (0.8, 0.03), (0.8, 0.06)])
def test_samples_that_wander_hardly_ever_leave(rho: float, wide: float):
    """As widely as those of digits-dmd2, .03, and more."""
    rng, mean, told, drift = random.Random(0), 0.0, 0, Drift()
    for i in range(1, 10_000):
        mean = rho * mean + math.sqrt(1 - rho**2) * rng.gauss(0.0, wide)
        drift.add(row(10 * i, mean))
        told += drift.left() is not None
    assert told <= 5


def test_what_says_nothing_of_the_samples_or_of_their_error_is_passed_over():
    drift = Drift()
    for i in range(1, 100):
        drift.add({"done": 10 * i, "stage": 0})
        drift.add(row(10 * i, math.nan))
        drift.add(row(10 * i, float(i), error=0.0))  # one sample at a time
        drift.add({**row(10 * i, float(i)), KEYS[0]: "bright"})
        drift.add({**row(10 * i, float(i)), KEYS[2]: None})
    assert drift.left() is None


def course(offset: Callable[[int], float], lines: float = -1.0) -> list[str]:
    """Alarms of a course whose own samples move by so many lines after BEFORE records; offset: of drawn ones."""
    good = dict.fromkeys(SAMPLES, 1.0)
    out = Course()
    for i in range(BEFORE + RECENT + 1):
        v = offset(i)
        out.add(row(10 * i, lines * (i > BEFORE), **good | {"samples/mean": 0.0, "samples/offset": v}))
    return [v.name for v in out.alarms()]


def test_it_is_an_alarm_of_its_side_unless_drawn_samples_come_nearer():
    assert course(lambda i: 0.05) == ["darkening"]
    assert course(lambda i: 0.05, lines=1.0) == ["brightening"]
    assert course(lambda i: -0.05 - 0.02 * i) == ["darkening"]
    assert course(lambda i: 0.2 if i <= BEFORE else 0.01) == []
    assert course(lambda i: 0.05 if i <= BEFORE else 0.04) == ["darkening"]  # by chance
    blind = Course([row(10 * i, -1.0 * (i > BEFORE)) for i in range(BEFORE + RECENT + 1)])
    assert [v.name for v in blind.alarms()] == ["darkening"]


def test_what_sets_in_begins_anew():
    """A reward, or a loss that is added after so many updates, moves samples on purpose."""

    def told(name: str) -> list[str]:
        more = {name: 1.0}
        out = Course(row(10 * i, 0.0) for i in range(BEFORE + 1))
        for i in range(BEFORE + 1, BEFORE + 50):
            out.add(row(10 * i, -1.0, **more))
            if out.alarms():
                return [v.name for v in out.alarms()]
        return []

    assert told("reward") == []
    for beside in ("samples/contrast", "skipped", "grad_norm/student"):  # a refused update has not changed the method
        assert told(beside) == ["darkening"]


def test_a_reward_moves_samples_on_purpose_and_only_the_line_of_their_mean_is_left():
    def alarms(lines: float, **reward: float) -> set[str]:
        out, said = Course(), set()
        for i in range(2 * BEFORE):
            far = lines * SHIFT * (i > BEFORE)
            drawn = {"samples/mean": far, "samples/offset": far}
            out.add(row(10 * i, lines * (i > BEFORE), **drawn, **reward))
            said |= {v.name for v in out.alarms()}
        return said

    earned = {"samples/reward": 0.2, "samples/fd": 0.1}
    assert alarms(0.6) == {"brightening"}
    assert alarms(0.6, **earned) == set()
    assert alarms(1.1, **earned) == {"brightening"}


def test_a_standing_warning_of_its_name_does_not_hide_it():
    out = Course()
    for i in range(BEFORE + RECENT + 1):
        never = {"samples/mean": -0.9, "samples/offset": -0.9}
        out.add(row(10 * i, -1.0 * (i > BEFORE), **never))
    assert {v.level for v in out.verdicts() if v.name == "darkening"} == {"warn", "alarm"}


def test_what_drawn_samples_tell_is_told_once():
    out = Course()
    for i in range(BEFORE + RECENT + 1):
        far = -1.0 * (i > BEFORE)
        out.add(row(10 * i, far, **{"samples/mean": far * SHIFT * 2, "samples/offset": far * SHIFT * 2}))
    assert [v.name for v in out.alarms()] == ["darkening"]
    assert "the reference" in out.alarms()[0].sentence


@pytest.mark.parametrize("bias", [0.0, 0.01])
def test_in_a_training_it_is_told_within_fifty_updates_of_the_onset_while_drawn_samples_say_nothing(bias: float):
    onset = 340
    settings = ("before.0.steps=100", "train.steps=300", "train.log_every=10", "train.readings_every=10")
    trainer = start(None, *settings, bias=lambda share: bias * share * (trainer.progress.done >= onset))
    trainer.fit()
    alarms = [line for line in trainer.lines if "ALARM" in line]
    assert bool(alarms) == bool(bias), alarms
    for first in alarms[:1]:
        assert "darkening: the mean of the method's own samples" in first
        assert onset + 20 <= int(first.partition("step ")[2].partition(":")[0]) <= onset + 50
