"""A settled mean that moves away is told before its line; one that wanders, returns or has yet to settle is not."""

from __future__ import annotations

import math
import random

import pytest

from fewstep.train.lines import SAMPLES, SHIFT
from fewstep.train.track import GAP, LEAVE, NOISE, RECENT, SETTLED, Track, settled_at

MEAN = SAMPLES["samples/mean"]
ROOM = LEAVE * SHIFT


def after(offsets: list[float], chance: float = 0.0) -> tuple[float, float, float] | None:
    """What is said of these offsets; chance: what is taken off them in the reading itself."""
    track = Track(MEAN)
    for v in offsets:
        track.add(math.copysign(max(0.0, abs(v) - chance), v), v)
    return track.left()


STILL = [0.0] * (SETTLED + GAP)


def test_two_means_beyond_the_room_of_a_still_one_have_left_and_one_has_not():
    assert after([*STILL, 0.0, 1.01 * ROOM]) is None
    assert after([*STILL, 0.99 * ROOM, 1.01 * ROOM]) is None
    assert after([*STILL, 1.02 * ROOM, 1.01 * ROOM]) == pytest.approx((1.01 * ROOM, ROOM, 0.0))
    assert after([*STILL, -1.02 * ROOM, -1.05 * ROOM]) == pytest.approx((-1.02 * ROOM, -ROOM, 0.0))
    assert after([*STILL[1:], 1.02 * ROOM, 1.01 * ROOM]) is None  # too few to know where it has settled


def test_the_room_grows_with_the_noise_of_the_readings_before():
    noisy = [0.02 * (i % 2) - 0.03 * (i % 3 == 0) for i in range(SETTLED)] + [0.0] * GAP
    level, noise = settled_at([abs(v) / SHIFT for v in noisy[:SETTLED]])
    limit = SHIFT * (level + max(LEAVE, NOISE * noise))
    assert NOISE * noise < LEAVE  # the floor holds for so little
    wide = [4 * v for v in noisy]
    level, noise = settled_at([abs(v) / SHIFT for v in wide[:SETTLED]])
    assert NOISE * noise > LEAVE
    for offsets, room in ((noisy, limit), (wide, SHIFT * (level + NOISE * noise))):
        assert after([*offsets, 0.99 * room, 0.99 * room]) is None
        assert after([*offsets, 1.01 * room, 1.01 * room]) is not None


def test_towards_the_reference_and_as_far_on_its_other_side_nothing_leaves():
    assert after([0.3] * len(STILL) + [0.05, 0.05]) is None
    assert after([0.16] * len(STILL) + [-0.17, -0.17]) is None  # another channel is the farthest now
    assert after([0.16] * len(STILL) + [-0.17 - ROOM, -0.17 - ROOM]) is not None


def test_what_may_be_chance_has_not_left():
    assert after([*STILL, 2 * ROOM, 2 * ROOM], chance=2.1 * ROOM) is None
    assert after([*STILL, 2 * ROOM, 2 * ROOM], chance=1.9 * ROOM) is not None


def test_of_a_log_without_offsets_nothing_is_said_and_a_change_of_log_begins_anew():
    track = Track(MEAN)
    for _ in range(SETTLED):
        track.add(0.0)
    for _ in range(RECENT):
        track.add(2 * ROOM, 2 * ROOM)
        assert track.left() is None
    for _ in range(SETTLED + GAP):
        track.add(0.001, 0.001)
    for _ in range(RECENT):
        track.add(2 * ROOM, 2 * ROOM)
    assert track.left() is not None
    track.add(2 * ROOM)
    assert track.left() is None


def test_only_of_the_mean_a_course_is_followed():
    assert {k: r.course for k, r in SAMPLES.items() if r.course} == {"samples/mean": "samples/offset"}


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_a_mean_that_wanders_hardly_ever_leaves(rho: float):
    """Of a student as steady as that of digits-dmd2, correlated from reading to reading or not."""
    rng, offset, left = random.Random(0), 0.0, 0
    track = Track(MEAN)
    for _ in range(10_000):
        offset = rho * offset + math.sqrt(1 - rho**2) * rng.gauss(0.0, 0.025)
        track.add(offset, offset)
        left += track.left() is not None
    assert left <= 2


def test_a_ramp_is_told_before_its_line_where_it_takes_it_within_twenty_readings():
    def told(readings: int) -> float:
        track = Track(MEAN)
        for i in range(200):
            offset = max(0, i - 50) * SHIFT / readings
            track.add(offset, offset)
            if track.left() is not None:
                return offset / SHIFT
        return math.inf

    assert max(told(n) for n in range(2, 20)) <= 1
    assert max(told(n) for n in range(6, 20)) < 0.6
    assert told(100) == math.inf


def test_what_is_no_number_is_left_to_the_lines():
    assert after([*STILL, math.nan, 5.0]) is None


@pytest.mark.parametrize(("key", "side"), [(k, s) for k, r in SAMPLES.items() for s in (r.below, r.above) if s])
@pytest.mark.parametrize("lines", [0.4, 1.0, 2.0])
def test_a_value_and_its_badness_are_inverse(key: str, side: tuple[str, str], lines: float):
    reading = SAMPLES[key]
    value = reading.at(-lines if side is reading.below else lines)
    assert (value < reading.centre) == (side is reading.below)
    assert reading.badness(value) == pytest.approx(lines)
