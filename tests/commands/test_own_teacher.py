"""A teacher that a run trains itself is measured with the weights it has got, not with those it was made with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.commands.report import first_teacher, shown_teacher
from fewstep.config import UserError
from fewstep.recipe.store import load
from fewstep.train.product import Product, open_product, product_of, teacher_beside
from fewstep.train.trainer import Trainer

SHORT = ("before.0.steps=2", "train.steps=1", "train.batch=4", "train.checkpoint_every=2", "train.readings_every=1000")


def same(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def open_like(recipe: Any) -> Product:
    return product_of(recipe, torch.nn.Identity(), recipe.data.open(), "it")


def test_the_teacher_of_a_run_that_fills_it_has_the_weights_of_its_checkpoint(tmp_path: Path):
    recipe = load("digits-deblur-ibmd", SHORT)
    trainer = Trainer(recipe, tmp_path, cpu=True)
    (tmp_path / "recipe.yaml").write_text(Path("recipes/digits-deblur-ibmd.yaml").read_text())
    made = {k: v.clone() for k, v in trainer.roles.teacher.state_dict().items()}
    trainer.fit()
    filled = trainer.roles.teacher
    assert any(not torch.equal(v, filled.state_dict()[k]) for k, v in made.items())
    assert first_teacher(trainer) is filled
    product = open_product(tmp_path)
    assert product.checkpoint is not None
    assert product.checkpoint.name == "step-00000003"
    assert same(teacher_beside(recipe, trainer.data, "it", product.checkpoint), filled)


def test_without_a_finished_stage_there_is_no_such_teacher(tmp_path: Path):
    recipe = load("digits-deblur-ibmd", SHORT)
    with pytest.raises(UserError, match="it: its teacher is trained by a run of it and has no weights before"):
        teacher_beside(recipe, recipe.data.open(), "it")
    Trainer(recipe, tmp_path, cpu=True).fit()
    before = tmp_path / "checkpoints" / "step-00000002"
    with pytest.raises(UserError, match="is not trained yet at step-00000002; let the run go on"):
        teacher_beside(recipe, recipe.data.open(), "it", before)


def test_what_is_shown_beside_leaves_an_untrained_teacher_out_unless_it_is_asked_for(tmp_path: Path, capsys: Any):
    recipe = load("digits-deblur-ibmd", SHORT)
    product = replace(open_like(recipe), checkpoint=None, title="it")
    assert shown_teacher(product, recipe.data.open(), required=False) is None
    assert "note: it: its teacher is trained by a run of it" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(UserError, match="has no weights before"):
        shown_teacher(product, recipe.data.open(), required=True)


def test_a_teacher_that_has_weights_needs_no_run():
    recipe = load("digits-dmd2")
    assert not recipe.fills_teacher()
    assert load("digits-deblur-ibmd").fills_teacher()
    assert same(teacher_beside(recipe, recipe.data.open(), "it"), Trainer(recipe, cpu=True).roles.teacher)
