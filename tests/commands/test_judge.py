"""Which errors of a measurement are the user's to mend, which keep their traceback; a run's own reward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.commands import judge
from fewstep.commands.measure import measure
from fewstep.config import UserError
from fewstep.eval.errors import InputError
from fewstep.eval.features.house import house_digits
from fewstep.eval.protocol.preset import load_preset
from fewstep.recipe.store import load
from fewstep.train.build import build_roles
from fewstep.train.product import product_of


@pytest.mark.parametrize("error", [InputError, FileNotFoundError, PermissionError, ModuleNotFoundError])
def test_what_was_given_wrong_is_one_message(error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise error("there: not what it should be")

    monkeypatch.setattr(judge, "preset_reference", refuse)
    with pytest.raises(UserError, match=r"^there: not what it should be$"):
        judge.open_judge(load_preset("energy"), {})


@pytest.mark.parametrize("error", [ValueError, ZeroDivisionError, KeyError, RuntimeError])
def test_an_error_of_the_code_stays_what_it_is(error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise error("a mistake")

    monkeypatch.setattr(judge, "preset_reference", broken)
    with pytest.raises(error, match="a mistake"):
        judge.open_judge(load_preset("energy"), {})


def test_a_preset_that_is_not_there_and_one_that_is_no_yaml_are_the_users(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    for name, why in (("nothing", "not one of"), (str(tmp_path / "bad.yaml"), "not YAML")):
        with pytest.raises((FileNotFoundError, InputError), match=why):
            load_preset(name)


@pytest.mark.parametrize("name", ["ink", "house-classifier"])
def test_the_reward_stands_beside_the_other_numbers(name: str):
    recipe = load("digits-dmd2-ink", ["roles.reward={name: " + name + "}"])
    data: Any = recipe.data.open()
    roles = build_roles(recipe, data)
    product = product_of(recipe, roles.student.eval(), data, "student")
    assert recipe.evaluate is not None
    own = judge.judge_of(product, replace(recipe.evaluate, samples=40))
    row, x = measure(product, own)
    assert [k.partition(" (")[0] for k in row.metrics] == ["FD", "class accuracy", "within-class diversity", "reward"]
    told = row.metrics[f"reward ({name})"]
    grey = ((x + 1) / 2).clamp(0, 1)
    if name == "ink":
        value = grey.flatten(1).mean(1)
    else:
        logits = house_digits().logits(255 * grey)
        value = logits.log_softmax(1)[torch.arange(40), torch.arange(40) % 10]
    assert told["value"] == pytest.approx(float(value.mean()), rel=5e-3)
    assert told["standard_error"] == pytest.approx(float(value.std()) / 40**0.5, rel=2e-2)
    torch.testing.assert_close(own.features(x), house_digits()((255 * grey).round()))


def test_a_reward_of_the_picture_in_the_condition_is_measured_too():
    recipe = load("digits-jdm")
    data: Any = recipe.data.open()
    product = product_of(recipe, build_roles(recipe, data).student.eval(), data, "student")
    assert recipe.evaluate is not None
    row, x = measure(product, judge.judge_of(product, replace(recipe.evaluate, samples=20)))
    kept = recipe.data.by(((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1) - product.paired(20).given
    reward = -kept.square().flatten(1).mean(1) / (2 * 0.3**2)
    assert row.metrics["reward (control)"]["value"] == pytest.approx(float(reward.mean()), rel=1e-4)


def test_a_run_without_a_reward_has_none_and_latents_have_none():
    recipe = load("digits-dmd2")
    product: Any = replace(product_of(recipe, torch.nn.Identity(), recipe.data.open(), "student"), title="x")
    assert judge.reward_of(product) is None
    assert judge.reward_of(replace(product, recipe=load("digits-dmd2-ink"), vae="somewhere")) is None
    assert judge.reward_of(replace(product, recipe=None)) is None


def test_the_distance_alone_is_the_distance_among_all_metrics():
    recipe = load("digits-dmd2")
    data: Any = recipe.data.open()
    product = product_of(recipe, build_roles(recipe, data).student.eval(), data, "student")
    assert recipe.evaluate is not None
    whole = judge.judge_of(product, replace(recipe.evaluate, metric="digits", samples=60))
    (every, _), (alone, _) = measure(product, whole, timed=False), measure(product, whole.of_distance(), timed=False)
    assert len(every.metrics) > 2
    assert list(alone.metrics) == [next(iter(every.metrics))]
    assert alone.distance.value == every.distance.value
    assert alone.seconds is None
