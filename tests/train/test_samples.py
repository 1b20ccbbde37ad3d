"""Readings of drawn samples: against closed forms, equal for every seed's run, and nothing of the training moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_core import F64
from tiny_runs import tiny
from torch import Tensor, nn

from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.train.samples import (
    ALIKE,
    SampleReadings,
    compared,
    figures,
    in_evaluation,
    patch_of,
    peaks,
    relative_frechet,
)
from fewstep.train.session import Session
from fewstep.train.trainer import Hooks, Trainer
from fewstep.train.verdicts import Course

COUNT, CHANNELS, HEIGHT, WIDTH = 48, 3, 12, 20
GROUP = torch.arange(COUNT) % 5
TILE = torch.randn(4, 4, generator=torch.Generator().manual_seed(9), dtype=F64)


def pictures(seed: int = 3) -> Tensor:
    """Smooth coloured noise around a mean of each channel, (48, 3, 12, 20)."""
    x = torch.randn(COUNT, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=F64)
    x = sum(x.roll((i, j), (2, 3)) for i in range(4) for j in range(4)) / 8
    return x + torch.tensor([0.3, -0.2, 0.1], dtype=F64).reshape(1, 3, 1, 1)


def told(x: Tensor, patch: int | None = 4) -> dict[str, float]:
    return compared(figures(x, GROUP, patch), figures(pictures(), GROUP, patch))


def test_samples_of_the_reference_read_as_it():
    found = told(pictures())
    assert found.pop("samples/mean") == found.pop("samples/offset") == 0
    assert found.pop("samples/grid") <= 1 + 1e-9  # a dip at every multiple of the patch's frequency is no peak
    assert found == pytest.approx(dict.fromkeys(found, 1.0))
    assert set(found) == {f"samples/{k}" for k in ("contrast", "saturation", "spread")}


def test_a_darker_picture_shifts_the_mean_and_nothing_else():
    found = told(pictures() - 0.4)
    own = figures(pictures(), GROUP, None)
    scale, chance = float(own["scale"]), 2 * 2**0.5 * own["noise"].sqrt()
    assert found["samples/mean"] == pytest.approx(-(0.4 - float(chance.min())) / scale)
    assert found["samples/offset"] == pytest.approx(-0.4 / scale)
    assert found["samples/contrast"] == pytest.approx(1)
    assert found["samples/saturation"] == pytest.approx(1)
    assert found["samples/spread"] == pytest.approx(1)
    # One channel alone is seen as well, where the mean over all of them would hardly move.
    x = pictures()
    x[:, 1] += 0.5
    assert told(x)["samples/mean"] == pytest.approx((0.5 - float(chance[1])) / scale)


def test_copies_that_the_reference_makes_too_have_no_spread_and_other_copies_are_read_as_it():
    one = torch.randn(1, 1, 8, 8, dtype=F64)
    copies, group = figures(one.expand(8, -1, -1, -1), torch.zeros(8), None), torch.zeros(8)
    assert compared(copies, copies)["samples/spread"] == 0.0
    real = figures(torch.randn(8, 1, 8, 8, dtype=F64), group, None)
    assert compared(copies, real)["samples/spread"] == 0.0
    assert "samples/spread" not in compared(figures(one, group[:1], None), figures(one, group[:1], None))


def test_few_points_are_not_off_by_what_chance_does():
    """Means of 32 points of unit deviation differ by a quarter of it, and half of all pairs by more than a sixth."""
    group = torch.zeros(32, dtype=torch.long)
    x = torch.randn(200, 32, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    found = [
        compared(figures(a, group, None), figures(b, group, None))["samples/mean"]
        for a, b in zip(x, x.flip(0), strict=True)
    ]
    assert sum(v == 0 for v in found) > 170
    assert max(map(abs, found)) < 0.35
    assert compared(figures(x[0] - 2, group, None), figures(x[1], group, None))["samples/mean"] < -1


def test_contrast_saturation_and_spread_are_ratios():
    x = pictures()
    middle = x.mean((2, 3), keepdim=True)
    assert told(middle + 1.7 * (x - middle))["samples/contrast"] == pytest.approx(1.7)
    grey = x.mean(1, keepdim=True)
    assert told(grey + 0.4 * (x - grey))["samples/saturation"] == pytest.approx(0.4)
    own = torch.stack([x[k == GROUP].mean(0) for k in range(5)])[GROUP]
    assert told(own + 0.3 * (x - own))["samples/spread"] == pytest.approx(0.3)
    assert "samples/saturation" not in compared(*2 * (figures(x[:, :1], GROUP, None),))


@pytest.mark.parametrize("patch", [2, 4])
def test_what_every_patch_repeats_is_a_peak_and_noise_is_none(patch: int):
    generator = torch.Generator().manual_seed(5)
    tile = torch.randn(patch, patch, generator=generator, dtype=F64)
    tile -= tile.mean()
    x = pictures()
    assert told(x + 0.25 * tile.repeat(HEIGHT // patch, WIDTH // patch), patch)["samples/grid"] > 10
    noise = torch.randn(x.shape, generator=generator, dtype=F64)
    assert told(x + 0.25 * noise, patch)["samples/grid"] < 3
    assert peaks(x, patch).shape == (patch**2 - 1,)


def test_vectors_have_mean_contrast_and_spread():
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    group = torch.zeros(500, dtype=torch.long)
    found = compared(figures(3 * x, group, None), figures(x, group, None))
    assert set(found) == {"samples/mean", "samples/offset", "samples/contrast", "samples/spread"}
    assert found["samples/contrast"] == pytest.approx(3)
    assert found["samples/spread"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("net", "shape", "period"),
    [
        ({"patch": 2}, (1, 8, 8), 2),
        ({"patch": 8}, (1, 8, 8), 4),  # one patch of a picture repeats nothing
        ({"patch": 4}, (3, 12, 20), 4),
        ({"patch": 8}, (3, 12, 20), 4),
        ({"config": SimpleNamespace(patch_size=1)}, (4, 16, 16), 2),
        ({"config": SimpleNamespace(down_block_types=("a", "b", "c"))}, (4, 16, 16), 4),
        ({}, (3, 16, 16), 4),
        ({}, (3, 9, 9), None),
        ({}, (2,), None),
    ],
)
def test_the_period_is_the_patch_or_the_strides(net: dict[str, Any], shape: tuple[int, ...], period: int | None):
    module = nn.Module()
    module.inner = nn.Module()
    for name, value in net.items():
        setattr(module.inner, name, value)
    assert patch_of(module, shape) == period


def test_readings_are_the_same_for_any_split_and_leave_torchs_generator_alone():
    session = Session(tiny("train.batch=24"), cpu=True)
    stage = session.recipe.stages()[-1]
    session.make_state(stage)
    before = torch.random.get_rng_state()
    whole = SampleReadings(session, 20).read(stage)
    assert torch.equal(torch.random.get_rng_state(), before)
    parts = SampleReadings(Session(tiny("train.batch=24", "train.accumulate=4"), cpu=True), 20).read(stage)
    assert whole == pytest.approx(parts, rel=1e-5)
    assert all(math.isfinite(v) for v in whole.values())


def test_a_teacher_that_does_not_see_the_condition_is_no_measure_of_the_spread_within_one():
    from fewstep.recipe.store import load

    read = {}
    for name, extra in {"digits-jdm": ("method.reward.weight=0.0",), "digits-dmd2": ()}.items():
        session = Session(load(name, ["train.batch=8", *extra]), cpu=True)
        session.make_state(session.recipe.stages()[-1])
        read[name] = SampleReadings(session, 20).read(session.recipe.stages()[-1])
    assert "samples/spread" in read["digits-dmd2"]
    assert "samples/spread" not in read["digits-jdm"]
    assert "samples/contrast" in read["digits-jdm"]


def test_a_students_temperature_is_no_loss_of_contrast():
    from fewstep.recipe.store import load

    read = []
    for scale in (1.0, 0.45):
        session = Session(load("toy/sid", ["train.batch=16", f"method.noise_scale={scale}"]), cpu=True)
        session.make_state(session.recipe.stages()[-1])
        read.append(SampleReadings(session, 20).read(session.recipe.stages()[-1]))
    assert read[0] == read[1]
    assert "samples/contrast" in read[0]


def test_a_blind_teacher_of_another_process_at_batch_one_is_read_too():
    from fewstep.recipe.store import load

    session = Session(load("digits-jdm", ["train.batch=1", "teacher.process={name: flow}"]), cpu=True)
    session.make_state(session.recipe.stages()[-1])
    readings = SampleReadings(session, 20)
    readings.reward = None  # whose readings are of more samples
    readings.count, readings.group = 1, readings.group[:1]
    read = readings.read(session.recipe.stages()[-1])
    assert "samples/contrast" in read
    assert "samples/spread" not in read


def test_a_batch_of_one_is_read_from_as_many_samples_as_tell_chance():
    """Of one sample the mean's error is unknown: two unlike pictures would be an alarm."""
    session = Session(tiny("train.batch=1"), cpu=True)
    stage = session.recipe.stages()[-1]
    session.make_state(stage)
    readings = SampleReadings(session, 20)
    assert readings.count == len(readings.group) == ALIKE
    at_once: set[int] = set()
    session.roles.student.register_forward_pre_hook(lambda net, args: at_once.add(len(args[0])))
    read = readings.read(stage)
    assert at_once == {1}  # what a step trains on, for which memory was planned
    assert {"samples/mean", "samples/spread"} <= set(read)
    reference = readings._reference
    assert reference is not None
    assert bool((reference["noise"] > 0).all())


def test_many_calls_are_asked_less_often():
    session = Session(tiny(), cpu=True)
    readings, (warm, last) = SampleReadings(session, 20), session.recipe.stages()
    assert [n for n in range(1, 61) if readings.due(last, n)] == [20, 40, 60]
    calls = warm.method.sampler().network_calls()
    assert calls > 8
    assert next(n for n in range(1, 20_001) if readings.due(warm, n)) == 20 * (calls**2 // 16)


def test_modules_are_in_evaluation_meanwhile_and_as_they_were_after():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    net[1].eval()
    with in_evaluation(net):
        assert not any(m.training for m in net.modules())
    assert [m.training for m in (net, net[0], net[1])] == [True, True, False]


def test_training_has_the_same_bits_with_and_without_readings():
    def trained(*settings: str) -> Trainer:
        short = ("before.0.steps=12", "train.steps=23", "train.log_every=5", "train.readings_every=4")
        trainer = Trainer(tiny(*short, *settings), cpu=True)
        trainer.fit()
        return trainer

    with_them, without = trained(), trained("train.guard=off")
    a, b = with_them.last_record, without.last_record
    assert any(k.startswith("samples/") for k in a)
    assert {k: v for k, v in a.items() if not k.startswith("samples/") and k != "seconds"} == {
        k: v for k, v in b.items() if k != "seconds"
    }
    for name in ("student", "critic", "discriminator"):
        own, other = with_them.roles[name].state_dict(), without.roles[name].state_dict()
        assert all(torch.equal(own[k], other[k]) for k in own)


def collapse(change: Callable[[Tensor, float], Tensor], count: int = 20) -> dict[str, int]:
    """The alarms of a run whose samples are those of another seed, changed more and more from the tenth reading on."""
    reference, course, first = figures(pictures(), GROUP, 4), Course(), {}
    for i in range(1, count + 1):
        x = change(pictures(4), max(0.0, (i - 10) / (count - 10)))
        course.add({"done": i, "stage": 0, **compared(figures(x, GROUP, 4), reference)})
        for v in course.alarms():
            first.setdefault(v.name, i)
    return first


def test_samples_of_another_seed_raise_no_alarm():
    assert collapse(lambda x, p: x) == {}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("darkening", lambda x, p: x - 0.6 * p),
        ("brightening", lambda x, p: x + 0.6 * p),
        ("losing contrast", lambda x, p: x * (1 - 0.5 * p)),
        ("contrast too high", lambda x, p: x * (1 + p)),
        ("colours fading", lambda x, p: (1 - p) * x + p * x.mean(1, keepdim=True)),
        ("samples alike", lambda x, p: (1 - p) * x + p * x[:5][GROUP]),
        ("grid artefacts", lambda x, p: x + 0.5 * p * TILE.repeat(HEIGHT // 4, WIDTH // 4)),
        ("losing contrast", lambda x, p: x if p == 0 else torch.full_like(x, 0.1)),
        ("not finite", lambda x, p: x if p < 0.5 else x / 0),
    ],
)
def test_each_collapse_is_named_while_it_is_on_its_way(name: str, change: Callable[[Tensor, float], Tensor]):
    found = collapse(change)
    assert name in found
    assert 10 < found[name] <= 20
    assert min(found.values()) > 10


def test_a_reward_is_read_in_deviations_of_the_reference_and_beside_it_the_frechet_distance():
    x, y = pictures(3).float(), pictures(4).float()
    own, reference = (figures(v, GROUP, None) for v in (x, y))
    assert not {"samples/reward", "samples/fd"} & set(compared(own, reference))
    own |= {"reward": torch.linspace(0, 2, COUNT), "points": x.flatten(1)[:, :5]}
    reference |= {"reward": torch.linspace(0, 1, COUNT), "points": y.flatten(1)[:, :5]}
    found = compared(own, reference)
    assert found["samples/reward"] == pytest.approx(0.5 / float(torch.linspace(0, 1, COUNT).std()))
    sizes = [FeatureStatistics(5, {}) for _ in range(2)]
    for size, side in zip(sizes, (own, reference), strict=True):
        size.update(side["points"])
    wanted = frechet_distance(own["points"], sizes[1]).value / float(reference["points"].var(0).sum())
    assert found["samples/fd"] == pytest.approx(wanted, rel=1e-4)
    nothing = compared(own | {"points": torch.full((COUNT, 5), math.nan)}, reference)
    assert math.isnan(nothing["samples/fd"])


def test_the_frechet_distance_takes_more_features_than_samples():
    x = torch.randn(20, 300, dtype=F64, generator=torch.Generator().manual_seed(1))
    assert relative_frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert relative_frechet(x + 0.5, x) == pytest.approx(0.25 * 300 / float(x.var(0).sum()))
    assert relative_frechet(2 * x, x) == pytest.approx(float((x.mean(0) ** 2).sum()) / float(x.var(0).sum()) + 1)


def test_a_run_with_a_reward_draws_more_samples_and_logs_it_beside_spread_and_distance():
    from fewstep.recipe.store import load

    cut = ["before=[]", "copy={}", "evaluate=null", "train.steps=2", "train.batch=8", "train.readings_every=1"]
    trainer = Trainer(load("toy/dmd2-ink", [*cut, "method.reward.after=0", "student.width=16"]), None, cpu=True)
    readings = trainer.guard.readings
    assert readings is not None
    assert readings.count == 256
    seen: list[Tensor] = []
    readings.features = lambda x: seen.append(x) or x[:, :1]  # type: ignore[func-returns-value]
    trainer.fit()
    assert {len(x) for x in seen} == {256}
    told = trainer.last_record
    assert {"reward", "reward_loss", "samples/reward", "samples/fd", "samples/spread"} <= set(told)
    assert told["reward_loss"] == pytest.approx(-0.5 * told["reward"])


def test_a_reward_is_read_only_while_it_is_followed():
    from fewstep.recipe.store import load

    cut = ["copy={}", "evaluate=null", "train.steps=3", "train.batch=8", "train.readings_every=1", "train.log_every=1"]
    before = "before=[{steps: 1, method: {name: denoise}}]"
    seen: list[bool] = []
    hooks = Hooks(on_step=lambda t: seen.append("samples/reward" in t.last_record))
    recipe = load("toy/dmd2-ink", [*cut, before, "method.reward.after=2", "student.width=16"])
    trainer = Trainer(recipe, None, hooks=hooks, cpu=True)
    trainer.fit()
    assert seen == [False, False, True, True]
    assert {"samples/mean", "samples/fd", "reward_loss"} <= set(trainer.last_record)
