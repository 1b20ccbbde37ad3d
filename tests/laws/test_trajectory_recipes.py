"""Every shipped recipe of the family checks, trains and samples; its student refuses other numbers of steps."""

from __future__ import annotations

import pytest
import torch

from fewstep.config import REGISTRY, RecipeError, UserError
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load
from fewstep.train.product import product_of
from fewstep.train.trainer import Trainer

NAMES = [
    "boot",
    "cd",
    "ct",
    "ctm",
    "ect",
    "freeflow",
    "icd",
    "ict",
    "imagine-flash",
    "imf",
    "imm",
    "kd",
    "lcm",
    "mdt",
    "meanflow",
    "meanflow-scratch",
    "pcm",
    "progressive",
    "reflow",
    "scd",
    "scfm",
    "sct",
    "self-e",
    "sfd",
    "sfd-v",
    "shortcut",
    "slimflow",
    "std",
    "tbcm",
    "tcm",
    "tdd",
    "traflow",
    "tscd",
    "twinflow",
]
METHODS = [
    "boot",
    "consistency",
    "ctm",
    "freeflow",
    "icd",
    "imagine_flash",
    "imm",
    "kd",
    "mdt",
    "meanflow",
    "progressive",
    "reflow",
    "scfm",
    "scm",
    "segments",
    "self_e",
    "sfd",
    "shortcut",
    "std",
    "tcm",
    "tdd",
    "twinflow",
]
NO_DIGITS = {"meanflow-scratch"}


def short(name: str, steps: int = 2) -> Trainer:
    stages = len(load(name).before)
    settings = [f"train.steps={steps}", "train.batch=8", "train.sample_every=0"]
    recipe = load(name, settings + [f"before.{i}.steps=1" for i in range(stages)])
    trainer = Trainer(recipe, cpu=True)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("name", NAMES)
def test_toy_recipe_trains_and_samples(name: str) -> None:
    trainer = short(f"toy/{name}")
    recipe = trainer.recipe
    assert trainer.progress.skipped == 0
    product = product_of(recipe, trainer.product.eval(), trainer.data, name)
    x = product.draw(6, 0)
    assert x.shape == (6, 2)
    assert bool(torch.isfinite(x).all())
    assert torch.equal(x, product.draw(6, 0, batch=4)) or torch.allclose(x, product.draw(6, 0, batch=4), atol=1e-5)
    assert product.trained is not None
    with pytest.raises(UserError, match="was trained for"):
        product.with_steps(23)
    assert len(product.with_steps(23, any_steps=True).sampler.steps) == 23


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NO_DIGITS])
def test_digits_recipe_checks(name: str) -> None:
    recipe = load(f"digits-{name}")
    toy = load(f"toy/{name}")
    assert recipe.method.name == toy.method.name
    assert recipe.teacher is not None


def test_every_method_has_a_toy_recipe() -> None:
    used = {load(f"toy/{name}").method.name for name in NAMES}
    assert used == set(METHODS)
    assert set(METHODS) <= set(REGISTRY["method"])
    assert {f"toy/{n}" for n in NAMES} <= set(shipped())


def test_a_flow_method_refuses_another_process() -> None:
    settings = [
        "student.process.name=trig",
        "student.prediction=trig",
        "teacher.process.name=trig",
    ]
    with pytest.raises(RecipeError, match=r"student\.process: method meanflow needs flow or shifted_flow, not trig$"):
        load("toy/meanflow-scratch", settings)
