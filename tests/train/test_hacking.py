"""The alarm for reward hacking: a reward that rises at the samples' cost, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from fewstep.commands.health import report
from fewstep.commands.progress import alarmed
from fewstep.train.hacking import ALIKE, APART, CHANCE, GAIN, Rise
from fewstep.train.verdicts import Course, alarms, verdicts


def records(rows: Iterable[tuple[float, float, float]]) -> list[dict[str, Any]]:
    """Log records of (reward, fd, spread), every 20 updates."""
    keys = ("samples/reward", "samples/fd", "samples/spread")
    return [{"done": 20 * i, "stage": 0, **dict(zip(keys, row, strict=True))} for i, row in enumerate(rows)]


COLD = [(-0.4, 0.5, 0.3), (0.1, 0.2, 0.7), (0.0, 0.02, 0.96), (0.05, 0.02, 0.97)]
AWAY = [*COLD, (0.6, 0.021, 0.96), (0.9, 0.02 * (2 * APART - 1), 0.95), (1.4, 0.02 * (3 * APART - 2), 0.94)]
ALIKE_ROWS = [*COLD, (0.5, 0.02, 0.9), (0.8, 0.021, ALIKE - 0.05), (0.9, 0.02, ALIKE - 0.08)]


def found(rows: Iterable[tuple[float, float, float]]) -> dict[str, str]:
    return {v.name: v.level for v in Course(records(rows)).verdicts() if v.name.startswith("reward")}


@pytest.mark.parametrize("rows", [AWAY, ALIKE_ROWS])
def test_a_reward_at_the_samples_cost_is_an_alarm_at_the_second_reading_beyond(rows: list[tuple[float, float, float]]):
    assert found(rows) == {"reward hacking": "alarm"}
    assert found(rows[:-1]) == {"reward": "fine"}
    assert alarms(records(rows))["reward hacking"] == 20 * (len(rows) - 1)


def test_what_costs_nothing_or_brings_nothing_is_fine():
    free = [*COLD, *[(0.1 * i, 0.02, 0.96) for i in range(12)]]
    worse = [*COLD, *[(0.05, 0.02 + 0.1 * i, 0.96 - 0.05 * i) for i in range(12)]]
    assert found(free) == found(worse) == {"reward": "fine"}
    assert found(COLD[:1]) == {}
    # A poor student on its way up earns a reward while it comes nearer.
    assert found([(0.2 * i, 1.0 - 0.1 * i, 0.1 * i) for i in range(1, 9)]) == {"reward": "fine"}


def test_readings_of_a_run_without_a_reward_say_nothing():
    assert found([]) == {}
    plain = [{"done": i, "stage": 0, "samples/spread": 0.9} for i in range(20)]
    assert [v.name for v in Course(plain).verdicts()] == ["spread within a class"]


def test_the_gain_counts_from_where_samples_were_nearest():
    rise = Rise()
    for record in records(AWAY):
        rise.add(record)
    assert rise.start == 0.0
    assert rise.gain() == pytest.approx(0.9)
    assert rise.apart() == pytest.approx(2 * APART - 1 - CHANCE / 0.02)
    assert rise.alike() == pytest.approx(0.95 / 0.96)
    value, line, text = rise.worst()
    assert (value, line) == (pytest.approx(rise.apart()), APART)
    assert f"{0.9:+.2f} of its deviations" in text
    assert GAIN < 0.9


def test_health_progress_and_page_tell_it(tmp_path: Any):
    from fewstep.train.log import Log

    log = records(AWAY)
    for record in log:
        Log(tmp_path / "log.jsonl").write(record)
    told = report(tmp_path)
    assert "ALARM" in told
    assert "reward hacking" in told
    assert f"(alarm since step {20 * (len(AWAY) - 1)})" in told
    assert "method.reward.weight" in told
    assert "reward hacking" in alarmed(log)
    assert "reward hacking" in [v.name for v in verdicts(log)]


def test_without_a_spread_the_distance_alone_decides():
    """Beside a teacher that does not see the condition there is none."""
    rows = records(AWAY)
    for record in rows:
        del record["samples/spread"]
    (told,) = [v for v in Course(rows).verdicts() if v.name.startswith("reward")]
    assert (told.name, told.level) == ("reward hacking", "alarm")
    assert "spread" not in told.sentence
    assert [v.level for v in Course(rows[:-1]).verdicts() if v.name == "reward"] == ["fine"]
