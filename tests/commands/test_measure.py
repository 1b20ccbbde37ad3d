"""A recipe's evaluation is a preset: the numbers of `run`, `eval` and a computation of one's own are the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_teacher import make_run, make_teacher

from fewstep.cli import main
from fewstep.commands.compare.compare import check_judges
from fewstep.commands.judge import judge_of, preset_of
from fewstep.commands.measure import measure
from fewstep.config import RecipeError, UserError
from fewstep.eval.features.house import house_digits
from fewstep.eval.metrics.energy import energy_distance
from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.metrics.measures import class_accuracy, within_class_diversity
from fewstep.eval.protocol.images import to_pixels
from fewstep.eval.protocol.preset import load_preset, preset_names
from fewstep.eval.protocol.reference import digits_reference
from fewstep.recipe.schema import Evaluate
from fewstep.recipe.store import load
from fewstep.train.build import build_roles
from fewstep.train.product import Product, open_product, product_of

N = 130


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = make_teacher(tmp_path_factory.mktemp("models") / "teacher")
    return make_run(tmp_path_factory.mktemp("trained") / "run", teacher)


def toy() -> Product:
    recipe = load("toy/kd", ["before=[]", "student.width=16", "student.depth=3"])
    data: Any = recipe.data.open()  # type: ignore[attr-defined]
    return product_of(recipe, build_roles(recipe, data).student.eval(), data, "toy")


def test_images_are_measured_as_by_hand(trained: Path):
    product = open_product(trained)
    row, x = measure(product, judge_of(product, Evaluate(samples=N, seed=7)))
    assert torch.equal(x, product.draw(N, 7, batch=32))  # the layout of a shard: of 130 samples, 32 at once
    extractor = house_digits()
    reference, labels = digits_reference(extractor), torch.arange(N) % 10
    features = extractor(to_pixels(x))
    expected = frechet_distance(features, reference.statistics)
    assert row.distance.value == pytest.approx(expected.value, rel=1e-6)
    assert row.distance.standard_error == pytest.approx(expected.standard_error, rel=1e-5)
    assert row.value("class accuracy") == class_accuracy(extractor.from_features(features), labels).value
    ratios = within_class_diversity(features, labels, reference.features, reference.labels)  # type: ignore[arg-type]
    assert row.value("within-class diversity") == pytest.approx(sum(ratios.values()) / 10, rel=1e-6)
    assert (row.calls, row.steps, row.number) == (1, 1, N)
    assert row.preset_hash == replace(load_preset("fd-house-digits"), number=N, first_seed=7).hash


def test_vectors_are_measured_as_by_hand():
    product = toy()
    row, x = measure(product, judge_of(product, Evaluate(metric="energy", samples=300, seed=3)))
    real, _ = product.recipe.data.open().all()  # type: ignore[union-attr,attr-defined]
    assert row.metrics["energy x1000"]["value"] == pytest.approx(1000 * energy_distance(x, real[:4000]), rel=1e-12)
    assert torch.equal(x, product.draw(300, 3, batch=64))
    assert row.omitted == {}


def test_a_sample_that_is_no_number_is_told_and_nothing_is_measured():
    product = toy()
    with torch.no_grad():
        next(product.net.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"toy: generate: samples 0\.\.63: .*64 hold NaN.*; nothing was measured"):
        measure(product, judge_of(product, Evaluate(metric="energy", samples=300)))


def test_eval_gives_the_numbers_of_the_run(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    arguments = ["eval", str(trained), "--samples", str(N), "--report", str(tmp_path / "report")]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    (told,) = json.loads((tmp_path / "report" / "report.json").read_text())
    product = open_product(trained)
    own: Any = product.recipe
    row, _ = measure(product, judge_of(product, replace(own.evaluate or Evaluate(), samples=N)))
    expected = row.as_json()
    assert {k: told[k] for k in ("preset_hash", "metrics", "files", "calls", "omitted")} == {
        k: expected[k] for k in ("preset_hash", "metrics", "files", "calls", "omitted")
    }
    assert told["seconds"] > 0
    assert "fd-house-digits" in capfd.readouterr().out


@pytest.mark.parametrize("name", preset_names())
def test_a_recipe_may_name_any_preset_that_measures(name: str):
    assert preset_of(Evaluate(metric=name, samples=50)).number == 50


def test_a_metric_that_is_no_preset_is_refused_with_a_suggestion():
    with pytest.raises(RecipeError, match=r"'fd-house-digit' is no preset .*did you mean 'fd-house-digits'\?"):
        load("digits-dmd2", ["evaluate.metric=fd-house-digit"])


def test_recipes_measured_against_different_data_do_not_compare(tmp_path: Path):
    wide = load("toy/cd", ["data.radius=2.0", "teacher.radius=2.0"])
    evaluation = Evaluate(metric="energy", samples=64)
    check_judges({"toy/cd": load("toy/cd"), "toy/kd": load("toy/kd")}, evaluation)
    with pytest.raises(UserError, match="toy/cd and wide are measured against different data by energy"):
        check_judges({"toy/cd": load("toy/cd"), "wide": wide}, evaluation)
