"""Methods beat their warm start within seconds: small networks, few updates, energy distance to the ring.

The budgets published in the cards are another matter (`python -m fewstep.conformance`); this is a net for methods
that train backwards, forget a term or stand still.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fewstep.eval import energy_distance

from fewstep.product import product_of
from fewstep.random import Draws, fold
from fewstep.recipe import load
from fewstep.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

WARM, STEPS, COUNT = 300, 80, 800
FACTOR = 0.6
"""Energy distance after the method over that of the warm start, at the recipe's own sampler."""
NAMES = ["class-ratio", "diff-instruct", "dmd", "imm", "inverse-matching", "kd", "ict", "progressive"]
"""Recipes whose methods have no other test of convergence and get there in STEPS updates."""


def run(name: str, steps: int) -> tuple[float, float]:
    """(energy distance x1000 of the warm start, of the product) of a small version of a toy recipe."""
    whole = load(f"toy/{name}")
    wide = "student.of" if hasattr(whole.student, "of") and whole.student.name != "copy" else "student"
    settings = [f"{wide}.width=32", f"{wide}.depth=4", "train.batch=64", f"train.steps={steps}"]
    settings += [
        "train.sample_every=0",
        "train.log_every=1000",
        "train.product=student",
        f"before.0.steps={WARM}",
    ]
    settings += [f"before.{i}.steps={steps // 3}" for i in range(1, len(whole.before))]
    if name == "dmd":
        settings += ["method.pairs=64", "method.pair_steps=8"]
    recipe = load(f"toy/{name}", settings)
    kept: list[Any] = []

    def keep(t: Trainer) -> None:
        if t.progress.done == WARM:
            kept.append(copy.deepcopy(t.roles.student))

    trainer = Trainer(recipe, None, on_step=keep, cpu=True)
    trainer.fit()
    real, _ = trainer.data.all()
    # Modes have unequal weights: labels must come as the data's do, not in turn.
    labels = trainer.data.batch(Draws(fold("quick labels"), torch.arange(COUNT)))[1]
    out = []
    for net in (kept[0], trainer.roles.student):
        x = product_of(recipe, net, trainer.data, name).draw(COUNT, 1000, labels)
        out.append(1000 * energy_distance(x.double(), real[:COUNT].double()))
    return out[0], out[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_beats_its_warm_start(name: str) -> None:
    before, after = run(name, STEPS)
    assert after < FACTOR * before, (name, before, after)
