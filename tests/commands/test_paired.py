"""A run on degraded data: measured against the truth, shown beside it, refused where nothing is to compare with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.commands.compare.compare import check_judges, common
from fewstep.commands.judge import judge_of, paired_of
from fewstep.commands.measure import measure
from fewstep.commands.pictures import beside
from fewstep.config import RecipeError, UserError
from fewstep.eval.protocol.preset import load_preset
from fewstep.recipe.schema import Evaluate, default_metric
from fewstep.recipe.store import load
from fewstep.train.build import build_roles
from fewstep.train.product import product_of
from fewstep.train.trainer import Trainer

HELD = {"name": "digits", "held_out": 0.2226}


def recipe(folder: Path, **parts: Any) -> Any:
    told: dict[str, Any] = {
        "about": "x",
        "data": {"name": "degraded", "of": HELD, "by": {"name": "pool", "factor": 2}, "keep": True},
        "student": {"name": "dit", "width": 8, "depth": 1, "heads": 2, "image": 1},
        "method": {"name": "denoise", "drop_cond": 0.5, "sample_steps": 1},
        "optim": {"default": {"lr": 1e-3}},
        "train": {"steps": 2, "batch": 4, "log_every": 1},
        "evaluate": {"samples": 12},
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(told | parts))  # which is YAML without aliases
    return load(str(file))


@pytest.fixture
def product(tmp_path: Path) -> Any:
    trainer = Trainer(recipe(tmp_path), cpu=True)
    trainer.fit()  # with classes and their dropout beside the picture
    return product_of(trainer.recipe, trainer.product.eval(), trainer.data, "student")


def test_samples_are_measured_against_what_they_were_made_from(product: Any):
    spec = product.recipe.evaluate
    assert spec.metric == "paired-house-digits" == default_metric(product.recipe.data)
    row, x = measure(product, judge_of(product, spec))
    pairs = product.paired(12)
    one = x.clamp(-1, 1)
    found = {name.partition(" (")[0]: entry["value"] for name, entry in row.metrics.items()}
    mse = (one - pairs.truth).square().flatten(1).mean(1)
    assert found["PSNR of a sample"] == pytest.approx(float((10 * torch.log10(4 / mse)).mean()), abs=0.05)
    kept = (product.recipe.data.by(one) - pairs.given).abs().mean()
    assert row.value("consistency") == pytest.approx(float(kept), abs=0.01)
    assert found["PSNR of the mean of 8"] > found["PSNR of a sample"]
    assert found["spread of 8"] > 0
    assert 0 <= found["class accuracy"] <= 1
    assert row.distance.value > 0
    assert row.omitted == {}


def test_every_repetition_has_the_same_conditions(product: Any):
    class Echo(torch.nn.Module):
        process = product.net.process

        def forward(self, x: Any, t: Any, cond: Any = None) -> Any:
            from fewstep.algebra.prediction import from_x0

            large = torch.nn.functional.interpolate(cond["image"], x.shape[-2:], mode="nearest")
            return from_x0(self.process, x, t, large)

    row, x = measure(replace(product, net=Echo()), judge_of(product, product.recipe.evaluate))
    values = {name.partition(" (")[0]: entry["value"] for name, entry in row.metrics.items()}
    assert values["spread of 8"] == pytest.approx(0, abs=1e-6)
    assert row.value("consistency") == pytest.approx(0, abs=0.005)
    with pytest.raises(UserError, match="makes samples from the data's pictures; leave them out"):
        product.draw(2, labels=3)
    sheet = beside(product, x)
    assert torch.equal(sheet[1::3], x)
    assert torch.equal(sheet[2::3], product.paired(12).truth)
    assert sheet.shape == (36, 1, 8, 8)


def test_a_preset_of_pairs_needs_pairs(tmp_path: Path):
    preset = load_preset("paired-house-digits")
    with pytest.raises(UserError, match="measures psnr, consistency, sharpness, spread, against the"):
        paired_of(preset, None)
    assert paired_of(preset, None, omit=("psnr", "consistency", "sharpness", "spread")) == (preset, None)
    plain = recipe(tmp_path, data={"name": "digits"}, student={"name": "dit", "width": 8, "depth": 1, "heads": 2})
    data = plain.data.open()
    found = product_of(plain, build_roles(plain, data).student, data, "student")
    with pytest.raises(UserError, match=r"only a run on data: \{name: degraded\} has them"):
        judge_of(found, Evaluate(metric="paired-house-digits", samples=12))


def opened(folder: Path, held: float, evaluate: dict[str, Any]) -> Any:
    data = {"name": "degraded", "of": {"name": "digits", "held_out": held}, "by": {"name": "pool", "factor": 2}}
    made = recipe(folder, data=data, evaluate=evaluate)
    return product_of(made, torch.nn.Identity(), made.data.open(), "student")


def test_no_held_out_picture_is_compared_twice(tmp_path: Path):
    """Rows that come again make errors over pictures too small."""
    left_out = opened(tmp_path, 0.2226, {})
    judge = judge_of(left_out, left_out.recipe.evaluate)
    assert judge.paired is not None
    assert judge.preset.number == len(judge.paired.truth) == left_out.held == 400
    few = opened(tmp_path, 0.05, {})
    assert judge_of(few, few.recipe.evaluate).preset.number == few.held == 89
    # The preset's own 400, by `fewstep eval --preset`, are as many as there are held out at most.
    preset, pairs = paired_of(load_preset("paired-house-digits"), few)
    assert pairs is not None
    assert preset.number == len(pairs.truth) == 89
    asked = opened(tmp_path, 0.05, {"samples": 90})
    told = r"samples 90: there are 89 held-out pictures; more samples of each come by repetitions of the preset, .* has 8"
    with pytest.raises(UserError, match=told):
        judge_of(asked, asked.recipe.evaluate)
    plain = load("digits-teacher", ["evaluate={}"])
    assert plain.evaluate is not None
    assert (plain.evaluate.samples, plain.evaluate.number) == (None, 1797)


def test_a_comparison_says_how_many_held_out_pictures_it_is_measured_on(tmp_path: Path):
    few, more = (opened(tmp_path, held, {}).recipe for held in (0.05, 0.1))
    assert check_judges({"few": few}, common({"few": few}, None)) == 89
    told = "samples: few on 89 and more on 179, as there are so many held-out pictures; give one number"
    with pytest.raises(UserError, match=told):
        check_judges({"few": few, "more": more}, common({"few": few, "more": more}, None))
    written = opened(tmp_path, 0.05, {"samples": 1797}).recipe
    assert common({"few": few, "written": written}, 12).samples == 12
    common({"few": few, "written": written}, None)  # 1797 is what is left out
    other = opened(tmp_path, 0.05, {"samples": 12}).recipe
    with pytest.raises(UserError, match="is measured with samples 1797 and other with 12; give one number to all"):
        common({"few": few, "other": other}, None)


def test_pictures_of_the_training_are_no_truth_to_compare_with(tmp_path: Path):
    found = opened(tmp_path, 0.0, {"samples": 12})
    assert len(found.paired(3).truth) == 3  # which it can still be drawn beside
    with pytest.raises(UserError, match=r"these data hold none out; train with data\.of\.held_out=0\.2, or give another"):
        judge_of(found, found.recipe.evaluate)
    fd = replace(found.recipe.evaluate, metric="fd-house-digits", samples=20)
    assert judge_of(found, fd).paired is None


def test_what_cannot_train_is_refused_before_it(tmp_path: Path):
    bare = {"name": "dit", "width": 8, "depth": 1, "heads": 2}
    with pytest.raises(RecipeError, match=r"dit.image: takes no picture, .* \[1, 4, 4\]; give image: 1"):
        Trainer(recipe(tmp_path, student=bare), cpu=True)
    with pytest.raises(RecipeError, match=r"dit.image: takes a picture of 3 channels"):
        Trainer(recipe(tmp_path, student=bare | {"image": 3}), cpu=True)
    alone = {"name": "degraded", "of": HELD, "by": {"name": "pool"}, "keep": False}
    roles = {"teacher": {"name": "network", "of": bare | {"image": 1}}, "critic": bare | {"image": 1}}
    with pytest.raises(RecipeError, match=r"a guidance scale of 2.0 needs conditions to move away from"):
        recipe(tmp_path, data=alone, method={"name": "dmd2", "gan": None, "guidance": 2.0}, **roles)
    with pytest.raises(RecipeError, match="data: method std needs data whose conditions are none or classes, not image"):
        recipe(tmp_path, method={"name": "std"}, **roles)


def test_a_bridge_does_not_begin_at_its_source_with_a_map(tmp_path: Path):
    net = {"name": "dit", "width": 8, "depth": 1, "heads": 2, "image": 1, "process": {"name": "bridge"}}
    blurred = {"name": "degraded", "of": HELD, "by": {"name": "blur"}, "keep": False}
    with pytest.raises(RecipeError, match=r"method: its steps \[1.0, 0.5\] begin at 1, where a bridge is its source"):
        recipe(
            tmp_path,
            data=blurred,
            student=net,
            teacher={"name": "network", "of": net},
            method={"name": "progressive", "steps": 2, "of": "teacher"},
        )
    with pytest.raises(RecipeError, match=r"evaluate\.fitted: no sampler is fitted to a bridge's teacher; leave it out"):
        recipe(tmp_path, data=blurred, student=net, evaluate={"fitted": True})
