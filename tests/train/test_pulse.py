"""A leap of a method's own samples is told in its second update, or in its first where it is wide."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from collapsing import ONSET, start
from tiny_runs import records

from fewstep.methods.readings import of_batch
from fewstep.train.lines import SHIFT, SHRINK
from fewstep.train.pulse import GAP, KEYS, NOISE, SEEN, SWIFT, Pulse

Row = tuple[float, float, float, float]
STILL: Row = (0.0, 0.01, 2.0, 0.5)
"""Mean, its standard error, deviation and spread."""


def after(*rows: Row, still: int = SEEN + GAP) -> dict[str, float]:
    pulse = Pulse([STILL] * still)
    out: dict[str, float] = {}
    for row in rows:
        out = pulse.add(row)
    return out


def moved(lines: float, error: float = STILL[1]) -> Row:
    return (lines * SHIFT * STILL[2], error, *STILL[2:])


def shrunk(lines: float) -> Row:
    return (*STILL[:3], STILL[3] * SHRINK**lines)


def test_one_wide_leap_is_enough_of_small_ones_two_in_a_row():
    assert after(STILL, moved(1.1)) == {}
    assert after(moved(1.3), moved(1.1)) == pytest.approx({"leap/mean": 1.1 * SHIFT})
    assert after(moved(-1.1), moved(-1.3)) == pytest.approx({"leap/mean": -1.1 * SHIFT})
    assert after(moved(1.3), moved(-1.1)) == {}
    assert after(STILL, moved(SWIFT + 0.1)) == pytest.approx({"leap/mean": (SWIFT + 0.1) * SHIFT})


def test_samples_that_become_alike_leap_and_those_that_spread_do_not():
    assert after(shrunk(1.3), shrunk(1.1)) == pytest.approx({"leap/spread": SHRINK**1.1})
    assert after(shrunk(-1.3), shrunk(-1.1)) == {}
    assert after(STILL, (*STILL[:3], 0.0))["leap/spread"] < 1e-9  # copies


def test_nothing_is_said_before_it_is_known_where_samples_have_been():
    assert after(moved(9), moved(9), still=SEEN + GAP - 3) == {}
    assert after(moved(9), moved(9), still=SEEN + GAP - 2) != {}


def test_a_leap_exceeds_the_noise_of_the_updates_before_and_its_own_standard_error():
    size = SHIFT * STILL[2] / 4
    noisy = [(size * (-1) ** i, *STILL[1:]) for i in range(SEEN + GAP)]
    low, high = ((f * NOISE * size, *STILL[1:]) for f in (0.9, 1.1))
    for row, found in ((low, False), (high, True)):
        pulse = Pulse(noisy)
        pulse.add(row)
        assert bool(pulse.add(row)) == found
    far = SWIFT + 1
    assert after(moved(far, error=0.9 * far * SHIFT * STILL[2] / NOISE)) != {}
    assert after(moved(far, error=1.1 * far * SHIFT * STILL[2] / NOISE)) == {}


def test_a_change_of_ten_updates_is_a_leap_and_a_slow_one_is_none():
    def drift(lines: float) -> list[int]:
        pulse = Pulse([STILL] * (SEEN + GAP))
        return [i for i in range(1, 200) if pulse.add(moved(lines * i))]

    assert drift(0.15)[0] == 8  # two in a row are a line away: the seventh and the eighth
    assert drift(0.02) == []


@pytest.mark.parametrize("rare", [0.0, 0.02, 0.001])
def test_batches_of_eight_healthy_samples_do_not_leap_with_a_rare_bright_condition_among_them(rare: float):
    rng = torch.Generator().manual_seed(0)
    pulse, count = Pulse(), 5000
    bright = torch.rand(count, 8, generator=rng) < rare
    level = -0.5 + bright.float() + 0.1 * torch.randn(count, 8, generator=rng)
    x = level[..., None] + 0.3 * torch.randn(count, 8, 16, generator=rng)
    each = x.mean(2)
    rows = zip(each.mean(1), each.std(1) / math.sqrt(8), x.flatten(1).std(1), x.std(1).mean(1), strict=True)
    assert sum(bool(pulse.add([float(v) for v in row])) for row in rows) == 0


def test_its_rows_are_what_a_method_says_of_a_batch():
    count = 5_000
    x = torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5 + 0.2
    row = [float(of_batch(x)[key]) for key in KEYS]
    error = 0.5 / math.sqrt(12 * count)
    assert row[0] == pytest.approx(0.2, abs=5 * error)
    assert row[1] == pytest.approx(error, rel=0.02)
    assert row[2] == pytest.approx(0.5, rel=0.01)
    assert row[3] == pytest.approx(0.5, rel=0.01)
    one = of_batch(x[:1])
    assert one["health/mean_error"] == one["health/spread"] == 0


def test_what_is_no_row_is_passed_over():
    pulse = Pulse([STILL] * 5)
    assert pulse.add((float("nan"), 0.1, 1.0, 1.0)) == {}
    assert len(pulse.rows) == 5
    assert len(Pulse([5, [1.0], [*STILL], None, ["a", 1.0, 1.0, 1.0]]).rows) == 1  # type: ignore[list-item]


LONGER = ("before.0.steps=5", "train.steps=95", "train.log_every=30", "train.readings_every=30")


def test_in_a_training_it_is_told_between_two_records_once():
    """Spoiled after the update ONSET + 1, which has drawn its samples before; the next one draws them from that."""
    once = iter([3.0])
    trainer = start(None, *LONGER, bias=lambda share: next(once, 0.0))
    trainer.fit()
    first = trainer.lines[0]
    assert f"step {ONSET + 2}: ALARM sudden change" in first
    assert "has leapt by" in first
    assert sum("sudden change" in line for line in trainer.lines) == 1


def test_a_run_stopped_and_resumed_knows_where_samples_have_been(tmp_path: Path):
    def run(folder: Path, stop: int) -> list[dict[str, object]]:
        once = iter([3.0])
        for end in (stop, 0):
            trainer = start(folder, *LONGER, bias=lambda share: next(once, 0.0))
            trainer.hooks.on_step = lambda t, end=end: setattr(t, "_stop", t.progress.done == end)
            try:
                trainer.fit()
            except KeyboardInterrupt:
                continue
        return records(folder)

    whole, parts = run(tmp_path / "whole", -1), run(tmp_path / "parts", ONSET - 3)
    assert parts == whole
    assert next(r["done"] for r in whole if "leap/mean" in r) == ONSET + 2


def test_small_batches_are_not_looked_at():
    once = iter([3.0])
    trainer = start(None, *LONGER, "train.batch=16", "train.accumulate=4", bias=lambda share: next(once, 0.0))
    trainer.fit()
    assert not any("sudden change" in line for line in trainer.lines)
