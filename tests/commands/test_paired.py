"""A run on degraded data: measured against the truth, shown beside it, refused where nothing is to compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

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

    from dataclasses import replace

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
    assert paired_of(preset, None, ("psnr", "consistency", "sharpness", "spread")) is None
    plain = recipe(tmp_path, data={"name": "digits"}, student={"name": "dit", "width": 8, "depth": 1, "heads": 2})
    data = plain.data.open()
    found = product_of(plain, build_roles(plain, data).student, data, "student")
    with pytest.raises(UserError, match=r"only a run on data: \{name: degraded\} has them"):
        judge_of(found, Evaluate(metric="paired-house-digits", samples=12))


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
