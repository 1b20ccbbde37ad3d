"""The health report: its readings against closed forms, its alarms on provoked failures, silence when all is well."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distribution_cases import F64, MEAN, STD, Affine, Follow

from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import Flow
from fewstep.commands.health import report
from fewstep.commands.health_plots import points, save
from fewstep.config import UserError
from fewstep.methods.readings import readings, spread
from fewstep.networks.analytic import gaussian
from fewstep.train.verdicts import FEWEST, alarms as first_alarms, last_stage, verdicts


def records(count: int = 40, **series: Any) -> list[dict[str, Any]]:
    """A log of one stage behind another one."""
    healthy = {
        "health/critic_slope": lambda p: 1.02,
        "discriminator_accuracy": lambda p: 0.7,
        "health/diversity": lambda p: 0.4 + 0.3 * p,
        "health/contrast": lambda p: 0.98,
        "skips": lambda p: 0,
    }
    made = {**healthy, **series}
    rows = [{"done": 10 * i, "stage": 1, **{k: f(i / count) for k, f in made.items()}} for i in range(1, count + 1)]
    # An earlier stage in which everything is wrong must not count.
    before = [{"done": 0, "stage": 0, "health/contrast": 9.0, "health/critic_slope": 5.0, "skips": 0}] * 20
    return before + rows


def alarms(rows: list[dict[str, Any]]) -> list[str]:
    return [v.name for v in verdicts(rows) if not v.fine]


def test_a_healthy_log_raises_no_alarm():
    found = verdicts(records())
    assert [v.name for v in found] == ["critic", "discriminator", "diversity", "contrast", "numerics"]
    assert all(v.fine and not v.remedy for v in found)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("health/critic_slope", "critic too slow"),
        ("discriminator_accuracy", "discriminator: no number"),
        ("health/diversity", "diversity: no number"),
        ("health/contrast", "contrast: no number"),
    ],
)
def test_a_reading_that_is_no_number_is_an_alarm(key: str, name: str):
    assert name in alarms(records(**{key: lambda p: math.nan if p > 0.9 else 0.7}))


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
    assert next(v for v in verdicts(rows) if v.name == name).remedy


def test_report_speaks_of_a_run_directory(tmp_path: Path):
    run = tmp_path / "mine"
    run.mkdir()
    with pytest.raises(UserError, match=r"has no log\.jsonl"):
        report(run)
    log = run / "log.jsonl"
    log.write_text("".join(json.dumps(r) + "\n" for r in records()))
    assert report(run).endswith("mine: fine")
    log.write_text("".join(json.dumps(r) + "\n" for r in records(**{"health/diversity": lambda p: 1 - 0.9 * p})))
    text = report(run)
    assert "ALARM  collapsing" in text
    assert "-> lower optim.student.lr" in text
    assert text.endswith("mine: collapsing")
    log.write_text("".join(json.dumps({"done": i, "stage": 0, "dsm": 1.0}) + "\n" for i in range(FEWEST - 1)))
    assert report(run) == (
        "dsm  1 -> 1\n\nmine: 9 records in the last stage, judged from 10 on: train longer or lower train.log_every"
    )
    log.write_text("".join(json.dumps(r) + "\n" for r in records(FEWEST)))
    assert report(run).endswith("mine: fine")  # ten records are ten
    log.write_text("")
    with pytest.raises(UserError, match="has no record in its log yet"):
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


def test_diversity_is_that_within_classes():
    """Far classes of unit spread: 1 with labels, the distance between classes without; lone samples say nothing."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(3).repeat(400)
    x = 100.0 * labels[:, None] + torch.randn(1200, 5, generator=generator, dtype=F64)
    within = float(spread(x, labels))
    assert abs(within - 1) < 4 / (2 * 1197 * 5) ** 0.5
    assert abs(float(spread(x)) - (1e4 * 2 / 3 * 1200 / 1199 + 1) ** 0.5) < 1
    # Two samples a class: the unbiased variance, (a - b)^2 / 2, whatever the classes' means.
    pairs = torch.tensor([[0.0], [2.0], [50.0], [56.0], [900.0]], dtype=F64)
    assert float(spread(pairs, torch.tensor([4, 4, 1, 1, 0]))) == pytest.approx(((2 + 2 + 18 + 18) / 4) ** 0.5)
    assert float(spread(pairs[:1], torch.tensor([4]))) == 0.0


def test_alarms_say_when_a_failure_began():
    rows = last_stage(records(60, **{"health/diversity": lambda p: 1.0 if p < 0.5 else 0.3}))
    found = first_alarms(rows)
    assert set(found) == {"collapsing"}
    assert 300 < found["collapsing"] < 450
    assert first_alarms(last_stage(records(60))) == {}


def test_plots_hold_the_readings_that_a_log_has(tmp_path: Path):
    from PIL import Image

    rows = last_stage(records(30, **{"health/gradient_0": lambda p: 1 + p, "dsm": lambda p: 2 - p}))
    titles = save(rows, tmp_path / "report" / "health.png")
    assert len(titles) == 6
    assert points(rows, "dsm") == ([10.0 * i for i in range(1, 31)], [2 - i / 30 for i in range(1, 31)])
    image = Image.open(tmp_path / "report" / "health.png").convert("RGB")
    # Red lines of alarm are drawn, and the curves in their colour.
    pixels = torch.tensor(list(zip(*(c.tobytes() for c in image.split()), strict=True)))
    assert int(((pixels - torch.tensor([214, 39, 40])).abs().sum(1) < 30).sum()) > 100
    assert int(((pixels - torch.tensor([31, 119, 180])).abs().sum(1) < 30).sum()) > 300
    assert save([{"done": 1, "stage": 0, "loss": 1.0}], tmp_path / "none.png") == []
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_diversity_is_judged_against_the_best_there_was():
    def rise_and_fall(p: float) -> float:
        return 0.3 + 1.4 * p if p <= 0.5 else 1.6 - 1.2 * p

    # More than at the start, and less than half of its best.
    assert alarms(records(**{"health/diversity": rise_and_fall})) == ["collapsing"]


def test_updates_refused_before_the_stage_began_do_not_count():
    rows = records(skips=lambda p: 30)
    assert alarms(rows) == []
    assert next(v for v in verdicts(rows) if v.name == "numerics").sentence.startswith("30 updates")
