"""Which weights are the product of a run, while it trains and when it is opened."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_runs import THIRD, tiny

from fewstep.train.product import open_product
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
