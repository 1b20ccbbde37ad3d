"""`fewstep.load`: values of Python are those of the command line, and a mistake is told by its argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep


@pytest.mark.parametrize(
    ("arguments", "keys", "told"),
    [
        ((["toy/dmd2"],), {}, "name: expected a recipe's name or path, not a list"),
        (("toy/dmd2", "train.steps=3"), {}, "settings: expected a mapping or a list"),
        (("toy/dmd2", ["train"]), {}, "argument 'train': expected key=value"),
        (("toy/dmd2", [3]), {}, "argument 3: expected text key=value"),
        (("toy/dmd2", {"train.steps": torch.ones(1)}), {}, "argument 'train.steps': a Tensor is no value of a recipe"),
        (("toy/dmd2",), {"train": {"clip": float("nan")}}, "argument 'train': nan is no value of a recipe"),
        (("toy/dmd2", {3: 1}), {}, "argument 3: expected a recipe's key"),
        (("toy/dmd2", {"train.steps.x": 1}), {}, "argument 'train.steps.x': train.steps has no keys"),
        (("toy/dmd2", {"before.7.steps": 1}), {}, "argument 'before.7.steps'"),
        (("toy/dmd2",), {"trian": {"steps": 3}}, "trian: unknown key; did you mean 'train'?"),
    ],
)
def test_a_mistake_is_told_by_its_argument(arguments: Any, keys: dict[str, Any], told: str):
    with pytest.raises((TypeError, fewstep.RecipeError)) as caught:
        fewstep.load(*arguments, **keys)
    assert told in str(caught.value)


def test_a_run_directory_is_told_where_its_recipe_is(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("extends: toy/dmd2")
    with pytest.raises(fewstep.RecipeError, match=r"is a run directory; its recipe is .*recipe\.yaml$"):
        fewstep.load(tmp_path)
    assert fewstep.load(tmp_path / "recipe.yaml") == fewstep.load("toy/dmd2")


def test_python_values_and_text_make_the_same_recipe():
    text = ["method.times={name: lognormal, mean: -1.0, std: 1.0}", "train.steps=3", "before.0.steps=7", "evaluate=null"]
    values: dict[str, Any] = {
        "method": {"times": {"name": "lognormal", "mean": -1.0, "std": 1.0}},
        "train": {"steps": 3},
        "before.0.steps": 7,
        "evaluate": None,
    }
    assert fewstep.load("toy/dmd2", values) == fewstep.load("toy/dmd2", text)
    part = fewstep.load("toy/dmd2", text).method.times
    assert fewstep.load("toy/dmd2", {**values, "method.times": part}) == fewstep.load("toy/dmd2", text)
