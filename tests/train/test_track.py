"""A settled reading that moves away is told before its line; one that wanders, returns or has yet to settle is not."""

from __future__ import annotations

import math
import random

import pytest

from fewstep.train.lines import SAMPLES
from fewstep.train.track import LEAVE, NOISE, PAST, RECENT, SETTLED, Track

MEAN, SPREAD, GRID = (SAMPLES[f"samples/{k}"] for k in ("mean", "spread", "grid"))


def after(values: list[float], reading=MEAN) -> tuple[float, float, float] | None:
    track = Track(reading)
    for v in values:
        track.add(v)
    return track.left()


def test_two_readings_beyond_the_room_of_a_still_one_have_left_and_one_has_not():
    room = LEAVE * 0.35
    still = [0.0] * SETTLED
    assert after([*still, 0.0, 1.01 * room]) is None
    assert after([*still, 0.99 * room, 1.01 * room]) is None
    assert after([*still, 1.02 * room, -1.01 * room]) is None
    assert after([*still, 1.02 * room, 1.01 * room]) == pytest.approx((1.01 * LEAVE, LEAVE, 0.0))
    assert after([*still, -1.02 * room, -1.05 * room]) == pytest.approx((-1.02 * LEAVE, -LEAVE, 0.0))
    assert after([*still[:-1], 1.02 * room, 1.01 * room]) is None  # too few to know where it has settled


def test_the_room_grows_with_the_noise_of_the_readings_before():
    noisy = [0.1 * (-1) ** i for i in range(PAST)]  # a deviation of 0.1 / 0.35 lines about 0
    room = NOISE * 0.1
    assert after([*noisy, 0.98 * room, 0.98 * room]) is None
    found = after([*noisy, 1.05 * room, 1.05 * room])
    assert found == pytest.approx((1.05 * room / 0.35, found[2] + room / 0.35, found[2]), rel=1e-9)


def test_towards_the_reference_nothing_leaves():
    assert after([0.3] * SETTLED + [0.05, 0.05]) is None
    assert after([0.7] * SETTLED + [0.9, 0.95], SPREAD) is None
    assert after([0.9] * SETTLED + [0.7, 0.7], SPREAD) is not None


def test_a_side_without_a_line_is_left_by_nothing():
    assert after([1.0] * SETTLED + [9.0, 9.0], SPREAD) is None
    assert after([1.0] * SETTLED + [0.1, 0.1], GRID) is None
    assert after([1.0] * SETTLED + [2.0, 2.0], GRID) is not None


def test_the_followed_course_is_that_of_another_key_where_there_is_one():
    track = Track(MEAN)
    for _ in range(SETTLED + RECENT):
        track.add(0.0, 0.0)
    track.add(0.0, -0.2)
    track.add(0.0, -0.2)
    assert track.left() is not None
    assert list(track.recent) == [0.0, 0.0]


def test_of_noise_alone_hardly_anything_leaves():
    rng = random.Random(0)
    values = [rng.gauss(0.0, 0.02) for _ in range(20_000)]
    track, left = Track(MEAN), 0
    for v in values:
        track.add(v)
        left += track.left() is not None
    assert left == 0


def test_what_is_no_number_is_left_to_the_lines():
    assert after([0.0] * SETTLED + [math.nan, 5.0]) is None


@pytest.mark.parametrize("key", sorted(SAMPLES))
@pytest.mark.parametrize("lines", [-0.4, 0.4, -2.0, 2.0])
def test_a_value_and_its_signed_lines_are_inverse(key: str, lines: float):
    reading = SAMPLES[key]
    if reading.line(reading.centre * 0.9 - 0.1 if lines < 0 else reading.centre * 1.1 + 0.1) is None:
        return
    assert reading.signed(reading.at(lines)) == pytest.approx(lines)
