"""A leap of a method's own samples is told in its second update, or in its first where it is wide."""

from __future__ import annotations

import random

import pytest
from collapsing import ONSET, start

from fewstep.train.lines import SHIFT, SHRINK
from fewstep.train.pulse import GAP, NOISE, SEEN, SWIFT, Pulse

STILL = (0.0, 2.0, 0.5)


def after(*rows: tuple[float, float, float], still: int = SEEN + GAP) -> dict[str, float]:
    pulse = Pulse([STILL] * still)
    out: dict[str, float] = {}
    for row in rows:
        out = pulse.add(row)
    return out


def moved(lines: float) -> tuple[float, float, float]:
    return (lines * SHIFT * STILL[1], *STILL[1:])


def shrunk(lines: float) -> tuple[float, float, float]:
    return (*STILL[:2], STILL[2] * SHRINK**lines)


def test_one_wide_leap_is_enough_of_small_ones_two_in_a_row():
    assert after(STILL, moved(1.1)) == {}
    assert after(moved(1.3), moved(1.1)) == pytest.approx({"leap/mean": 1.1 * SHIFT})
    assert after(moved(-1.1), moved(-1.3)) == pytest.approx({"leap/mean": -1.1 * SHIFT})
    assert after(moved(1.3), moved(-1.1)) == {}
    assert after(STILL, moved(SWIFT + 0.1)) == pytest.approx({"leap/mean": (SWIFT + 0.1) * SHIFT})


def test_samples_that_become_alike_leap_and_those_that_spread_do_not():
    assert after(shrunk(1.3), shrunk(1.1)) == pytest.approx({"leap/diversity": SHRINK**1.1})
    assert after(shrunk(-1.3), shrunk(-1.1)) == {}
    assert after(STILL, (*STILL[:2], 0.0))["leap/diversity"] < 1e-9  # copies


def test_nothing_is_said_before_it_is_known_where_samples_have_been():
    assert after(moved(9), moved(9), still=SEEN + GAP - 3) == {}
    assert after(moved(9), moved(9), still=SEEN + GAP - 2) != {}


def test_a_leap_exceeds_the_noise_of_the_updates_before():
    size = SHIFT * STILL[1] / 4
    noisy = [(size * (-1) ** i, *STILL[1:]) for i in range(SEEN + GAP)]
    low, high = ((f * NOISE * size, *STILL[1:]) for f in (0.9, 1.1))
    for row, found in ((low, False), (high, True)):
        pulse = Pulse(noisy)
        pulse.add(row)
        assert bool(pulse.add(row)) == found


def test_a_change_of_ten_updates_is_a_leap_and_a_slow_one_is_none():
    def drift(lines: float) -> list[int]:
        pulse = Pulse([STILL] * (SEEN + GAP))
        return [i for i in range(1, 200) if pulse.add(moved(lines * i))]

    assert drift(0.15)[0] == 8  # two in a row are a line away: the seventh and the eighth
    assert drift(0.02) == []


def test_of_noise_alone_nothing_leaps():
    rng = random.Random(0)
    pulse = Pulse()
    assert not any(pulse.add((rng.gauss(0, 0.2), 1.0, abs(rng.gauss(0.4, 0.05)))) for _ in range(20_000))


def test_what_is_no_number_is_passed_over():
    pulse = Pulse([STILL] * 5)
    assert pulse.add((float("nan"), 1.0, 1.0)) == {}
    assert len(pulse.rows) == 5


def test_in_a_training_it_is_told_between_two_records():
    """Spoiled after the update ONSET + 1, which has drawn its samples before; the next one draws them from that."""
    once = iter([3.0])
    longer = ("before.0.steps=5", "train.steps=95", "train.log_every=30", "train.readings_every=30")
    trainer = start(None, *longer, bias=lambda share: next(once, 0.0))
    trainer.fit()
    first = trainer.lines[0]
    assert f"step {ONSET + 2}: ALARM sudden change" in first
    assert "has leapt by" in first
    assert sum("sudden change" in line for line in trainer.lines) == 1
