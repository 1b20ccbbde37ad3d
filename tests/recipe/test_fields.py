"""Every key of a recipe says what it is, and dotted keys find it."""

from __future__ import annotations

import ast
import inspect

import pytest
from pydantic import TypeAdapter

from fewstep.algebra.times import LogNormal
from fewstep.config import REGISTRY, OneOf, RecipeError, config
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import DMD2
from fewstep.recipe.fields import REQUIRED, brief, doc_of, extends, find, keys_of, recipe_parts, summary, type_of
from fewstep.recipe.schema import AdamW, Recipe
from fewstep.recipe.store import load
from fewstep.recipe.training import Train


def test_the_parts_of_a_recipe_are_all_that_is_registered_and_what_they_hold():
    parts = set(recipe_parts())
    assert {part for of_kind in REGISTRY.values() for part in of_kind.values()} <= parts
    assert {Recipe, Train, AdamW, Critic} <= parts


def test_no_part_and_no_key_is_without_its_docstring():
    """`explain`, the schema and annotated recipes have no other text: write it under the field, as all others are."""
    without = [f"{p.__module__}.{p.__name__}.{k.name}" for p in recipe_parts() for k in keys_of(p) if not k.doc]
    assert without == []
    assert [p for p in recipe_parts() if not summary(p).rstrip(")").endswith(".")] == []


def test_a_docstring_is_the_text_under_its_own_field():
    """The text of every field, taken from the class's own source in another way."""
    body = ast.parse(inspect.getsource(DMD2)).body[0].body  # type: ignore[attr-defined]
    at = next(i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign) and node.target.id == "gan")  # type: ignore[attr-defined]
    assert doc_of(DMD2, "gan") == " ".join(body[at + 1].value.value.split())
    assert doc_of(REGISTRY["process"]["shifted_flow"], "shift").startswith("s: SD3 and SANA 3;")
    assert extends().doc.startswith("A shipped recipe, or a file beside")


def test_a_field_without_a_docstring_has_none():
    @config
    class Bare:
        """A part."""

        first: int = 1
        second: int = 2
        """Of the second alone."""

    assert (doc_of(Bare, "first"), doc_of(Train, "nothing")) == ("", "")


def test_types_and_defaults_are_those_that_a_recipe_is_checked_by():
    told = {key.name: (type_of(key.hint, key.above), key.default) for key in keys_of(Train)}
    assert told["precision"] == ("fp32 or bf16", "fp32")
    assert told["ema"] == ("list of numbers", (0.999,))
    assert told["offload"] == ("true or false", False)
    kinds = {key.name: type_of(key.hint, key.above) for key in (*keys_of(AdamW), *keys_of(Recipe), *keys_of(DMD2))}
    assert kinds["betas"] == "[number, number]"
    assert kinds["teacher"] == "a teacher part or null"
    assert kinds["times"] == "a times part"
    assert kinds["copy"] == "mapping of names to texts"
    assert kinds["critic"] == "a mapping"
    for part in recipe_parts():
        for key in keys_of(part):
            assert type_of(key.hint, key.above), key
            if key.default is not REQUIRED and not isinstance(key.hint, OneOf):
                TypeAdapter(key.hint).validate_python(key.default)


def test_a_default_part_is_told_by_what_it_changes():
    assert brief(Critic(steps=5)) == {"steps": 5}
    assert brief(LogNormal()) == {"name": "lognormal"}
    assert brief(LogNormal(mean=0.5)) == {"name": "lognormal", "mean": 0.5}
    assert brief((0.9, 1.0)) == [0.9, 1.0]


@pytest.mark.parametrize(
    ("key", "owner", "name"),
    [
        ("train.ema_warmup", "Train", "ema_warmup"),
        ("optim.student.lr", "AdamW", "lr"),
        ("optim.lr", "AdamW", "lr"),
        ("method.dmd2.critic.steps", "Critic", "steps"),
        ("before.0.method.kd.solver", "KD", "solver"),
        ("before.steps", "Stage", "steps"),
        ("before.0.rates.student", "Stage", "rates"),
        ("copy.critic", "Recipe", "copy"),
        ("roles.target.copy.of", "Copy", "of"),
        ("times.lognormal.mean", "LogNormal", "mean"),
        ("method.joint.methods.1.weight", "Share", "weight"),
    ],
)
def test_keys_are_found(key: str, owner: str, name: str):
    ((part, found),) = find(key).keys
    assert (part.__name__, found.name) == (owner, name)


def test_parts_and_kinds_are_found_and_a_key_of_several_parts_is_told_of_each():
    assert find("method.dmd2").part is DMD2
    assert find("critic.lora").part is REGISTRY["network"]["lora"]
    assert find("times").kind == "times"
    assert {p for p, _ in find("data.path").keys} == {
        p for p in REGISTRY["data"].values() if "path" in {k.name for k in keys_of(p)}
    }


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("trian", "'trian' is no key of a recipe; did you mean 'train'?"),
        ("dmd2", "'dmd2' is no key of a recipe; did you mean 'method.dmd2'?"),
        ("ema_warmup", "'ema_warmup' is no key of a recipe; did you mean 'train.ema_warmup'?"),
        ("train.ema_warmupp", "train has no 'ema_warmupp'; did you mean 'ema_warmup'?"),
        ("method.consistancy", "method has no 'consistancy'; did you mean 'consistency'?"),
        ("method.dmd2.wieght", "method.dmd2 has no 'wieght'"),
        ("about.more", "about has no 'more'; about has no keys"),
        ("", "'' is no key of a recipe; `fewstep explain` lists them"),
        ("0", "'0' is no key of a recipe"),
    ],
)
def test_a_wrong_key_says_what_is_near(key: str, message: str):
    with pytest.raises(RecipeError) as caught:
        find(key)
    assert str(caught.value).startswith(f"explain {key}: {message}")


def test_checking_a_recipe_reads_no_docstring(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a source file was parsed")

    monkeypatch.setattr(ast, "parse", refuse)
    load("toy/dmd2", ["train.steps=3"])
