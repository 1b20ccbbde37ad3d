"""The schema for editors: every shipped recipe fits it, and mistakes do not."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from fewstep.config import load_yaml, parse
from fewstep.recipe.fields import keys_of, recipe_parts
from fewstep.recipe.json_schema import DRAFT, json_schema
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import shipped
from fewstep.recipe.store import dump, load


@pytest.fixture(scope="module")
def validator() -> Any:
    whole = json_schema()
    assert whole["$schema"] == DRAFT
    jsonschema.Draft202012Validator.check_schema(whole)
    return jsonschema.Draft202012Validator(whole)


def errors(validator: Any, text: str) -> list[str]:
    return [f"{e.json_path}: {e.message}" for e in validator.iter_errors(parse(text, "recipe").data)]


def test_every_shipped_recipe_fits(validator: Any):
    for name, path in shipped().items():
        assert [e.message for e in validator.iter_errors(load_yaml(path).data)] == [], name


@pytest.mark.parametrize("name", ["digits-dmd2", "toy/joint", "paper/sana-sprint"])
def test_a_recipe_with_every_default_filled_in_fits(validator: Any, name: str):
    assert errors(validator, dump(load(name))) == []


WHOLE = "about: x\ndata: {name: ring}\nstudent: {name: mlp}\noptim: {default: {lr: 1e-3}}\nmethod: {name: kd}\n"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (WHOLE.replace("name: kd", "name: kd, stpes: [1.0]"), "stpes"),
        (WHOLE.replace("name: kd", "name: kdd"), "kdd"),
        (WHOLE.replace("name: kd", "name: kd, teacher_steps: 0"), "0 is less than or equal to"),
        (WHOLE.replace("1e-3", "fast"), "'fast'"),
        (WHOLE + "train: {precision: fp8}", "'fp8'"),
        (WHOLE + "evaluate: {metrics: energy}", "metrics"),
        (WHOLE.replace("method: {name: kd}", ""), "not valid under any"),
        (WHOLE.replace("name: kd", "temperature: 2"), "$.method"),
    ],
)
def test_a_mistake_does_not_fit(validator: Any, text: str, where: str):
    assert errors(validator, WHOLE) == []
    found = errors(validator, text)
    assert found
    assert where in "\n".join(found)


def test_what_the_loader_takes_fits(validator: Any):
    """A base gives what is left out, and a mapping without a name changes its default key by key."""
    assert errors(validator, "extends: toy/dmd2\nmethod: {critic: {steps: 2}}\n") == []
    assert errors(validator, "extends: toy/dmd2\nmethod: {times: {low: 0.1}}\nteacher: null\n") == []


def test_every_key_has_its_description_and_its_default():
    whole = json_schema()
    described = 0
    for owner in (whole, *whole["$defs"].values()):
        for name, about in owner["properties"].items():
            if name != "name":
                assert about["description"], name
                described += 1
    assert described == 1 + sum(len(keys_of(part)) for part in recipe_parts())
    assert whole["$defs"]["Train"]["properties"]["batch"]["default"] == 128
    assert set(whole["properties"]) == {key.name for key in keys_of(Recipe)} | {"extends"}
