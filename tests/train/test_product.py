"""Which weights are the product of a run, while it trains and when it is opened."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import THIRD, tiny
from torch import nn

from fewstep.config import RecipeError, UserError
from fewstep.export.levels import check_product
from fewstep.recipe.store import load
from fewstep.train.build import build_roles
from fewstep.train.product import open_product, product_of
from fewstep.train.trainer import Trainer


def test_the_product_is_the_average_that_the_recipe_names(tmp_path: Path):
    for product in ("ema", "student"):
        recipe = tiny(*THIRD, "before.0.steps=2", "train.steps=3", f"train.product={product}")
        run = tmp_path / product
        trainer = Trainer(recipe, run, cpu=True)
        trainer.fit()
        average, student = trainer.session.ema[0].module, trainer.roles.student
        assert trainer.product is (average if product == "ema" else student)
        weights, other = trainer.product.state_dict(), (student if product == "ema" else average).state_dict()
        opened = open_product(run).net.state_dict()
        assert all(torch.equal(v, weights[k]) for k, v in opened.items())
        assert any(not torch.equal(v, other[k]) for k, v in opened.items())


@pytest.mark.parametrize(
    ("recipe", "points", "steps", "levels"),
    [
        ("digits-imm", None, 4, (0.994, 0.7455, 0.497, 0.2485)),  # training ends at .994
        ("digits-ctm", 40, 2, (1.0, 20 / 39)),  # of 39 intervals
        ("digits-ctm", None, 2, (1.0, 0.5)),
        ("digits-meanflow", None, 2, (1.0, 0.5)),
    ],
)
def test_other_numbers_of_steps_stand_where_it_was_trained(
    recipe: str, points: int | None, steps: int, levels: tuple[float, ...]
):
    loaded = load(recipe, [f"method.points={points}"] if points else [])
    product = product_of(loaded, nn.Identity(), SimpleNamespace(shape=(1, 8, 8), classes=10), recipe)
    assert product.with_steps(steps).sampler.steps == pytest.approx(levels, abs=1e-12)


def test_a_student_of_several_lists_of_steps_stands_at_the_levels_of_each():
    lists = "method.step_lists=[[0.8], [1.0, 0.3], [1.0, 0.75, 0.5, 0.25]]"
    recipe = load("toy/dmd2", ["method.gan=null", "method.steps=[1.0, 0.3]", lists])
    data = recipe.data.open()
    product = product_of(recipe, build_roles(recipe, data).student, data, "student")
    assert (product.trained, product.sampler.steps) == ((1, 2, 4), (1.0, 0.3))
    for levels in ((0.8,), (1.0, 0.3), (1.0, 0.75, 0.5, 0.25)):
        there = product.with_steps(len(levels))
        assert there.sampler.steps == levels
        check_product(there)
    with pytest.raises(UserError, match="was trained for 1, 2, 4; add --any"):
        product.with_steps(3)
    with pytest.raises(RecipeError, match=r"step_lists: none is steps, \[1\.0\]"):
        load("toy/dmd2", [lists])
    with pytest.raises(RecipeError, match="step_lists: simulate, jumps and first_step have steps of their own"):
        load("toy/dp-dmd", ["method.step_lists=[[1.0], [1.0, 0.75, 0.5, 0.25]]"])
