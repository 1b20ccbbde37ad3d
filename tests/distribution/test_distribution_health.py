"""The health report: its readings against closed forms, its alarms on provoked failures, silence when all is well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distribution_cases import F64, MEAN, STD, Affine, Follow

from fewstep.config import UserError
from fewstep.health import FEWEST, report, verdicts
from fewstep.methods.terms import readings
from fewstep.networks.analytic import gaussian
from fewstep.process import Flow, add_noise
from fewstep.random import Draws, fold


def records(count: int = 40, **series: Any) -> list[dict[str, Any]]:
    """A log of one stage, whose last record carries the next stage's number as the trainer's does."""
    healthy = {
        "health/critic_slope": lambda p: 1.02,
        "discriminator_accuracy": lambda p: 0.7,
        "health/diversity": lambda p: 0.4 + 0.3 * p,
        "health/contrast": lambda p: 0.98,
        "skips": lambda p: 0,
    }
    made = {**healthy, **series}
    rows = [
        {"done": 10 * i, "stage": 1, **{k: f(i / count) for k, f in made.items()}}
        for i in range(1, count + 1)
    ]
    rows[-1]["stage"] = 2
    # An earlier stage in which everything is wrong must not count.
    before = [{"done": 0, "stage": 0, "health/contrast": 9.0, "health/critic_slope": 5.0, "skips": 0}] * 20
    return before + rows


def alarms(rows: list[dict[str, Any]]) -> list[str]:
    return [v.name for v in verdicts(rows) if not v.fine]


def test_a_healthy_log_raises_no_alarm():
    found = verdicts(records())
    assert [v.name for v in found] == ["critic", "discriminator", "diversity", "contrast", "numerics"]
    assert all(v.fine and not v.advice for v in found)


@pytest.mark.parametrize(
    ("name", "series"),
    [
        ("critic too slow", {"health/critic_slope": lambda p: 1 + 0.5 * p}),
        ("critic too slow", {"health/critic_slope": lambda p: 1 - 0.4 * p}),
        ("discriminator winning", {"discriminator_accuracy": lambda p: 0.7 + 0.3 * p}),
        ("discriminator lost", {"discriminator_accuracy": lambda p: 0.7 - 0.4 * p}),
        ("collapsing", {"health/diversity": lambda p: 1 - 0.7 * p}),
        ("oversaturated", {"health/contrast": lambda p: 1 + 0.6 * p}),
        ("washed out", {"health/contrast": lambda p: 0.6}),
        ("non-finite gradients", {"skips": lambda p: round(30 * p)}),
    ],
)
def test_each_failure_is_named_with_a_knob(name: str, series: dict[str, Any]):
    rows = records(**series)
    assert alarms(rows) == [name]
    assert next(v for v in verdicts(rows) if v.name == name).advice


def test_report_speaks_of_a_run_directory(tmp_path: Path):
    run = tmp_path / "mine"
    run.mkdir()
    with pytest.raises(UserError, match=r"has no log\.jsonl"):
        report(run)
    log = run / "log.jsonl"
    log.write_text("".join(json.dumps(r) + "\n" for r in records()))
    assert report(run).endswith("mine: fine")
    log.write_text(
        "".join(json.dumps(r) + "\n" for r in records(**{"health/diversity": lambda p: 1 - 0.9 * p}))
    )
    text = report(run)
    assert "ALARM  collapsing" in text
    assert "-> lower optim.student.lr" in text
    assert text.endswith("mine: collapsing")
    log.write_text("".join(json.dumps({"done": i, "stage": 0, "dsm": 1.0}) + "\n" for i in range(FEWEST - 1)))
    with pytest.raises(UserError, match="fewer than 10 records"):
        report(run)


def read(student: Affine, critic: Any, count: int = 20_000) -> dict[str, float]:
    """The readings of a score method for an affine student and a critic, over many draws."""
    draws = Draws(fold("health"), torch.arange(count))
    z, eps = draws.normal(1, dtype=F64), draws.normal(1, dtype=F64)
    x = (student.mean + student.std * z).detach()
    t = 0.02 + 0.96 * draws.uniform()
    x_t, _ = add_noise(Flow(), x, eps, t)
    real, fake = gaussian(Flow(), MEAN, STD)(x_t, t), critic(x_t, t)
    found = readings(x, real, (fake.x0 - real.x0).detach(), fake)
    return {k: float(v) for k, v in found.items()}


def test_slope_of_a_critic_that_follows_is_one_and_tells_the_direction_of_a_lag():
    now = Affine(Flow(), 0.0, 1.2)
    assert abs(read(now, Follow(now))["health/critic_slope"] - 1) < 0.03
    assert read(now, Follow(Affine(Flow(), 0.0, 0.4)))["health/critic_slope"] > 1.2
    assert read(now, Follow(Affine(Flow(), 0.0, 3.0)))["health/critic_slope"] < 0.95
    with torch.no_grad():
        assert "health/critic_slope" not in readings(
            torch.ones(4, 1),
            gaussian(Flow(), 0.0, 1.0)(torch.ones(4, 1), torch.full((4,), 0.5)),
            torch.ones(4, 1),
        )


def test_contrast_and_diversity_of_gaussian_students():
    right, large = Affine(Flow(), MEAN, STD), Affine(Flow(), 4 * MEAN, 4 * STD)
    good = read(right, Follow(right))
    assert abs(good["health/diversity"] - STD) < 4 * STD / (2 * 20_000) ** 0.5
    assert abs(good["health/contrast"] - 1) < 0.05
    assert all(good[f"health/gradient_{k}"] < 1e-12 for k in range(4))
    bad = read(large, Follow(large))
    assert bad["health/contrast"] > 1.1
    assert all(bad[f"health/gradient_{k}"] > 1e-3 for k in range(4))
