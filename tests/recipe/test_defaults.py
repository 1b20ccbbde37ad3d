"""A key set inside a part with a default leaves the rest as the default has it: a method's published settings."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import yaml

import fewstep.methods  # noqa: F401  registers the methods
from fewstep.algebra.times import LogNormal, Uniform
from fewstep.config import REGISTRY, RecipeError, parse, plain, validate
from fewstep.methods.critic import Critic
from fewstep.methods.gan import Gan

METHODS: dict[str, Any] = {name: method for name, method in REGISTRY["method"].items() if name != "joint"}
PARTS = [
    (name, field)
    for name, method in METHODS.items()
    for field in ("critic", "gan")
    if field in {f.name for f in fields(method)}
]
NEW = {
    "weight": {"critic": "v", "gan": 0.125},
    "steps": {"critic": 7},
    "alignment": {"critic": 0.03},
    "reset_every": {"critic": 9},
    "discriminator_weight": {"gan": 0.25},
    "loss": {"gan": "hinge"},
    "r1_weight": {"gan": 3.5},
    "r1": {"gan": "exact"},
    "shares_noise": {"gan": False},
    "times": {"critic": {"name": "levels", "at": [0.5]}, "gan": {"name": "levels", "at": [0.5]}},
}
ALONE = ("decoupled_dmd", "gdd", "ladd")
"""Methods without a critic's turn beside the discriminator's."""


def build(method: str, settings: Any) -> Any:
    text = yaml.safe_dump({"name": method, **settings})
    return validate(METHODS[method], parse(text, "mine.yaml"))


def test_every_method_with_a_critic_of_its_own_has_the_part_and_no_flat_key():
    critics = {name for name, field in PARTS if field == "critic"}
    gans = {name for name, field in PARTS if field == "gan"}
    assert critics == {
        "decoupled_dmd", "dmd", "dmd2", "emd", "f_distill", "factorised", "freeflow", "phased_dmd", "sid", "track",
        "uni_instruct", "vsd",
    }  # fmt: skip
    assert gans == {
        "ctm", "decoupled_dmd", "dmd2", "f_distill", "gdd", "imagine_flash", "ladd", "segments", "sid", "std",
        "uni_instruct",
    }  # fmt: skip
    flat = {f.name for method in METHODS.values() for f in fields(method)}
    assert not {name for name in flat if name.startswith(("critic_", "gan_")) and name != "gan_from"}


@pytest.mark.parametrize(("method", "field"), PARTS)
def test_one_key_of_a_part_leaves_the_others_as_the_method_has_them(method: str, field: str):
    before = getattr(METHODS[method](), field)
    part = before or {"critic": Critic, "gan": Gan}[field]()
    for key in (f.name for f in fields(part)):
        # A student that stands still, or is seen through views, leaves its critic nothing to be drawn to.
        still = method in ("track", "factorised") and key in ("alignment", "reset_every")
        value = type(NEW[key][field])(0) if still else NEW[key][field]
        if method == "std" and key == "times":  # its levels are those of its own legs
            value = plain(part)[key]
        got = plain(getattr(build(method, {field: {key: value}}), field))
        assert got == {**plain(part), key: value}


def test_published_defaults_of_the_critics():
    got = {name: METHODS[name]().critic for name, field in PARTS if field == "critic"}
    every, edm = Uniform(low=0.0, high=1.0), LogNormal()
    assert got == {
        "dmd2": Critic(times=every, weight="x0", steps=5),
        "f_distill": Critic(times=every, weight="x0", steps=5),
        "decoupled_dmd": Critic(times=every, weight="x0", steps=5),
        "phased_dmd": Critic(times=Uniform(low=0.02, high=1.0), weight="psi", steps=5),
        "dmd": Critic(times=every, weight="x0", steps=1),
        "vsd": Critic(times=every, weight="x0", steps=1),
        "emd": Critic(times=every, weight="x0", steps=1),
        "factorised": Critic(times=every, weight="x0", steps=1),
        "track": Critic(times=every, weight="x0", steps=1),
        "freeflow": Critic(times=Uniform(low=1e-3, high=1.0), weight="velocity", steps=1),
        "sid": Critic(times=edm, weight="edm", steps=1),
        "uni_instruct": Critic(times=edm, weight="edm", steps=1),
    }


def test_a_mapping_without_a_name_changes_the_default_and_one_with_a_name_is_new():
    assert build("sid", {"critic": {"times": {"std": 1.5}}}).critic.times == LogNormal(mean=-1.2, std=1.5)
    assert build("ladd", {"gan": {"times": {"mean": 0.0}}}).gan.times == METHODS["ladd"]().gan.times.__class__(
        mean=0.0, std=1.0
    )
    # dmd2's critic has low 0; a part that is named has its own defaults, low 0.02.
    assert build("dmd2", {"critic": {"times": {"high": 0.9}}}).critic.times == Uniform(low=0.0, high=0.9)
    named = build("dmd2", {"critic": {"times": {"name": "uniform", "high": 0.9}}}).critic.times
    assert named == Uniform(high=0.9)
    assert named.low == 0.02


def test_a_part_that_is_off_by_default_starts_from_its_own_defaults_and_one_that_is_on_can_be_off():
    assert build("sid", {"gan": {"weight": 0.5}}).gan == Gan(weight=0.5)
    assert build("sid", {}).gan is None
    assert build("dmd2", {"gan": None}).gan is None
    assert build("dmd2", {"gan": {}}).gan == Gan()


@pytest.mark.parametrize(
    ("method", "text", "message"),
    [
        ("dmd2", "gan_weight: 0", "gan_weight: unknown key; did you mean 'gan.weight'?"),
        ("dmd2", "gan_loss: hinge", "gan_loss: unknown key; did you mean 'gan.loss'?"),
        ("dmd2", "gan_times: {name: uniform}", "gan_times: unknown key; did you mean 'gan.times'?"),
        ("dmd2", "gan_shares_noise: true", "gan_shares_noise: unknown key; did you mean 'gan.shares_noise'?"),
        ("dmd2", "discriminator_weight: 1.0", "discriminator_weight: unknown key; did you mean "
         "'gan.discriminator_weight'?"),
        ("dmd2", "critic_steps: 2", "critic_steps: unknown key; did you mean 'critic.steps'?"),
        ("sid", "critic_weight: v", "critic_weight: unknown key; did you mean 'critic.weight'?"),
        ("vsd", "critic_times: {name: uniform}", "critic_times: unknown key; did you mean 'critic.times'?"),
        ("gdd", "r1_weight: 0.0", "r1_weight: unknown key; did you mean 'gan.r1_weight'?"),
        ("dmd2", "critic: {stpes: 2}", "critic.stpes: unknown key; did you mean 'steps'?"),
        ("dmd2", "critic: {times: {lo: 0.1}}", "critic.times.lo: unknown key; did you mean 'low'?"),
        ("sid", "critic: {times: {sdt: 0.1}}", "critic.times.sdt: unknown key; did you mean 'std'?"),
        ("dmd2", "critic: {steps: 0}", "critic.steps: steps must be at least 1, not 0"),
        ("dmd2", "gan: {weight: 0}", "gan.weight: weight and discriminator_weight must be positive; `gan: null` is no "
         "discriminator"),
        ("uni_instruct", "gan: null", "gan: an object, got None"),
        *((name, "gan: {shares_noise: true}", "gan.shares_noise: no critic trains beside the discriminator of this "
           "method") for name in ALONE),
    ],
)  # fmt: skip
def test_old_and_misspelt_keys_are_told_where_they_belong(method: str, text: str, message: str):
    with pytest.raises(RecipeError) as caught:
        validate(METHODS[method], parse(f"name: {method}\n{text}\n", "mine.yaml"))
    assert str(caught.value) == f"mine.yaml:2: {message}"
