"""Points and voxels the whole way: trained, drawn, shown, measured; no export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.commands.judge import judge_of
from fewstep.commands.measure import measure, teacher_product
from fewstep.commands.pictures import save_grid, save_side_by_side
from fewstep.export.base import ExportRefused
from fewstep.export.choose import parts_of
from fewstep.recipe.schema import default_metric
from fewstep.recipe.store import load
from fewstep.train.product import open_product, product_of
from fewstep.train.trainer import Trainer

SMALL = ("train.batch=6", "train.steps=2", "train.guard=off", "train.sample_every=0", "evaluate.samples=12")
POINTS = (
    *SMALL,
    "data.points=10",
    "data.shortest=8",
    "teacher.of={name: dit1d, width: 8, depth: 1, centred: true}",
    "student={name: dit1d, width: 8, depth: 1, centred: true}",
    "before.0.steps=2",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


def test_chains_of_several_lengths_are_trained_drawn_and_measured(tmp_path: Path) -> None:
    recipe = load("helices-sid", [*POINTS, "train.readings_every=1", "train.guard=warn", "method.noise_scale=0.7"])
    trainer = Trainer(recipe, tmp_path / "run", cpu=True)
    trainer.fit()
    product = open_product(tmp_path / "run")
    x = product.draw(12, 3)
    count = product.labels(12)["points"].sum(1)
    assert {8, 9, 10} >= set(count.tolist()) > {8}
    assert torch.equal((x != 0).any(-1).sum(1).float(), count)
    assert x.sum(1).abs().max() < 1e-5
    warm = replace(product, sampler=replace(product.sampler, noise_scale=1.0)).draw(12, 3)
    assert not torch.equal(x, warm)
    judge = judge_of(product, recipe.evaluate)  # type: ignore[arg-type]
    row, drawn = measure(product, judge)
    assert drawn.shape == (12, 10, 3)
    starts = ("energy x1000", "bond error (data ", "radius of gyration", "1-NNA", "right-handed turns (data 0.")
    assert [s for s in (*starts, "chains with a clash") if not any(k.startswith(s) for k in row.metrics)] == []
    assert row.omitted == {}
    assert row.distance.value == row.metrics["energy x1000"]["value"]
    teacher = teacher_product(product, trainer.roles.teacher, 2)
    assert measure(teacher, judge)[0].calls == 3
    save_grid(x, tmp_path / "grid.png")
    save_side_by_side([("a", x), ("b", drawn)], tmp_path / "sides.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000
    with pytest.raises(ExportRefused, match=r"noise_scale 0\.7"):
        parts_of(product)
    with pytest.raises(ExportRefused, match=r"samples of \[10, 3\] are points"):
        parts_of(replace(product, sampler=replace(product.sampler, noise_scale=1.0)))


@pytest.mark.parametrize("name", ["voxel-digits-mdt", "voxel-digits-kd", "voxel-digits-dmd2"])
def test_solids_are_trained_and_measured(name: str) -> None:
    tiny = "{name: dit, patch: 4, width: 8, depth: 1}"
    recipe = load(
        name,
        [*SMALL, f"teacher.of={tiny}", f"student={tiny}", "before.0.steps=1", "train.steps=1", "evaluate.samples=30"],
    )
    trainer = Trainer(recipe, cpu=True)
    trainer.fit()
    product = product_of(recipe, trainer.product.eval(), trainer.data, name)
    row, x = measure(product, judge_of(product, recipe.evaluate))  # type: ignore[arg-type]
    assert x.shape == (30, 8, 8, 8)
    assert row.omitted == {}
    assert len(row.metrics) == 5
    assert row.metrics["hanging voxels (data 0)"]["value"] >= 0
    assert 0 <= row.metrics["class accuracy (heights, house-digits)"]["value"] <= 1


def test_the_metric_follows_from_the_data() -> None:
    assert default_metric(load("helices-sid").data) == "chains"
    assert default_metric(load("voxel-digits-mdt").data) == "voxels"
