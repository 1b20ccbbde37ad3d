"""Failures provoked on the ring: the alarm comes before the energy distance is visibly worse than its best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fewstep.eval import energy_distance
from fewstep.recipe.store import load
from fewstep.train.product import product_of
from fewstep.train.trainer import Hooks, Trainer
from fewstep.train.verdicts import alarms

WARM = 150
SMALL = (
    "student.width=64",
    "student.depth=4",
    f"before.0.steps={WARM}",
    "train.batch=128",
    "train.log_every=2",
    "train.sample_every=0",
    "train.product=student",
)
WORSE = 1.35
"""Energy distance over its best, from which on a run has visibly got worse."""


FAR = "before.0.method.weight=x0"
"""A start at the mean of the data: the x0 error finds it soon, the velocity error is near the noise as long."""


@dataclass
class Story:
    """What a run's health said, and when its energy distance (x1000) was how large; steps of the last stage."""

    alarms: dict[str, int]
    energy: list[tuple[int, float]]

    def worse_from(self) -> int:
        """The first step after the best measurement at which the distance is visibly larger than that."""
        best = min(value for _, value in self.energy)
        at = next(i for i, (_, value) in enumerate(self.energy) if value == best)
        return next((step for step, value in self.energy[at:] if value > WORSE * best), 10**9)


def told(name: str, steps: int, *settings: str, every: int = 0) -> Story:
    """Train a small version of a toy recipe and read its log; `every` measures the distance so often."""
    recipe = load(name, [*SMALL, f"train.steps={steps}", *settings])
    first = sum(stage.steps for stage in recipe.before)
    rows: list[dict[str, Any]] = []
    energy: list[tuple[int, float]] = []

    def on_step(t: Trainer) -> None:
        done = t.progress.done - first
        if t.last_record.get("done", 0) == t.progress.done and done > 0:
            rows.append(t.last_record)
        if every and done > 0 and done % every == 0:
            x = product_of(recipe, t.roles.student, t.data, "student").draw(1000, 1000)
            energy.append((done, 1000 * energy_distance(x.double(), real)))

    trainer = Trainer(recipe, None, hooks=Hooks(on_step=on_step), cpu=True)
    real = trainer.data.all()[0][:1000].double()
    trainer.fit()
    return Story({k: v - first for k, v in alarms(rows).items()}, energy)


@pytest.mark.parametrize("name", ["toy/dmd2", "toy/sid"])
def test_healthy_runs_raise_no_alarm(name: str):
    assert told(name, 120).alarms == {}


def test_a_critic_that_is_too_slow_and_the_saturation_that_follows():
    slow = ("method.critic.steps=5", "method.critic.weight=x0", "optim.critic={lr: 1e-4}")
    story = told("toy/dmd2", 240, *slow, FAR, "optim.student={lr: 4e-3}", every=12)
    assert {"critic too slow", "oversaturated"} <= set(story.alarms), story
    assert story.alarms["critic too slow"] < story.worse_from() < 10**9, story
    assert story.alarms["oversaturated"] < story.worse_from(), story


def test_a_collapse():
    fast = "optim.student={lr: 5e-3, betas: [0.0, 0.99]}"
    story = told("toy/gdd", 100, fast, "optim.discriminator={lr: 1e-3}", every=10)
    assert "collapsing" in story.alarms, story
    assert story.alarms["collapsing"] < story.worse_from() < 10**9, story


def test_a_discriminator_that_wins():
    """Shown almost clean samples of a student that can only move its mean, it knows every one; nothing improves."""
    clean = "method.gan.times={name: uniform, low: 0.0, high: 0.1}"
    stiff = "method.freeze=[first, time, layers, shift, last.weight]"
    strong = ("method.discriminator_steps=5", "optim.discriminator={lr: 1e-2}", "optim.critic={lr: 5e-3}")
    story = told("toy/gdd", 40, clean, stiff, *strong, FAR, every=20)
    assert set(story.alarms) == {"discriminator winning"}, story
    assert story.alarms["discriminator winning"] <= 24
    assert story.energy[-1][1] > 400, story  # where it began; a healthy run is far below
