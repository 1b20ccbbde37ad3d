"""Every recipe of the family runs: all its stages, two steps each, and its readings are numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.methods.base import Needs
from fewstep.recipe import Recipe, load, shipped
from fewstep.sampling import sample, seeded
from fewstep.train.trainer import Trainer

NAMES = [
    "class-ratio", "decoupled-dmd", "diff-instruct", "disback", "dmd", "emd", "f-distill", "gdd", "gdd-i",
    "inverse-matching", "joint", "ladd", "multi-student", "pg-sb", "phased-dmd", "sid", "sida", "sim", "swiftbrush",
    "uni-instruct",
]  # fmt: skip


def short(name: str, *settings: str) -> Recipe:
    """A toy recipe of two steps a stage with small networks."""
    stages = len(load(name).before)
    student = (
        "student.of.width=16" if "of" in vars(load(name).student) and name != "toy/x" else "student.width=16"
    )
    cut = [f"before.{i}.steps=2" for i in range(stages)]
    extra = ["method.pairs=20", "method.pair_steps=3"] if name == "toy/dmd" else []
    return load(
        name, [*cut, *extra, student, "train.steps=2", "train.batch=16", "train.log_every=1", *settings]
    )


@pytest.mark.parametrize("name", NAMES)
def test_toy_recipe_runs_all_stages(name: str):
    recipe = short(f"toy/{name}")
    trainer = Trainer(recipe, None, cpu=True)
    before = [p.detach().clone() for p in trainer.roles.student.parameters()]
    trainer.fit()
    assert trainer.progress.done == 2 * len(recipe.stages())
    assert trainer.progress.skipped == 0
    readings = {k: v for k, v in trainer.last_record.items() if isinstance(v, float)}
    assert all(math.isfinite(v) for v in readings.values()), readings
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.roles.student.parameters(), strict=True)]
    assert any(moved)
    start, fresh = seeded(0, torch.arange(7), (2,))
    cond = torch.arange(7) if trainer.data.classes else None
    x = sample(recipe.sampler(), trainer.product, start, cond, fresh)
    assert x.shape == (7, 2)
    assert torch.isfinite(x).all()


def test_phases_begin_with_a_fresh_critic_and_train_one_expert_each():
    recipe = short("toy/phased-dmd")
    trainer = Trainer(recipe, None, cpu=True)
    stages = recipe.stages()
    snapshots: dict[int, Any] = {}
    fit_stage = trainer._run_stage

    def watched(stage: Any) -> None:
        snapshots[trainer.progress.stage] = {
            name: {k: v.clone() for k, v in trainer.roles[name].state_dict().items()}
            for name in ("student", "critic", "start")
        }
        fit_stage(stage)

    trainer._run_stage = watched  # type: ignore[method-assign]
    trainer.fit()
    assert [s.method.name for s in stages] == ["denoise", "phased_dmd", "phased_dmd"]
    after = trainer.roles.student.state_dict()
    for key, value in snapshots[2]["student"].items():
        moved_in_last = not torch.equal(value, after[key])
        moved_in_first = not torch.equal(value, snapshots[1]["student"][key])
        if "members.0." in key:
            assert not moved_in_last
        if "members.1." in key:
            assert not moved_in_first
    assert any("members.1." in k and not torch.equal(v, after[k]) for k, v in snapshots[2]["student"].items())
    # The last phase's critic starts from the same weights as the first's did, not from where that one ended.
    start = trainer.roles["start"].state_dict()
    assert all(torch.equal(start[k], v) for k, v in snapshots[1]["student"].items())
    one = replace(recipe, train=replace(recipe.train, steps=1))
    again = Trainer(one, None, cpu=True)
    again.progress.stage = 2
    again.roles["start"].load_state_dict(start)
    for p in again.roles.critic.parameters():
        p.data.add_(3.0)
    again._begin(one.stages()[2])
    assert all(torch.equal(start[k], v) for k, v in again.roles.critic.state_dict().items())


def test_disback_follows_the_recorded_teachers_back():
    recipe = load("toy/disback")
    reals = [getattr(s.method, "real", None) for s in recipe.stages()]
    assert reals == [None, None, None, "degraded_far", "degraded_near", "teacher"]
    trainer = Trainer(short("toy/disback"), None, cpu=True)
    trainer.fit()
    near, far = (trainer.roles[n].state_dict() for n in ("degraded_near", "degraded_far"))
    assert any(not torch.equal(near[k], far[k]) for k in near)


def test_pairs_are_solved_once_and_kept_in_the_state():
    trainer = Trainer(short("toy/dmd"), None, cpu=True)
    trainer.fit()
    bank: Any = trainer.roles["state"]
    assert int(bank.filled) == 20
    assert "state" in trainer.modules()
    kept = bank.x0.clone()
    bank.fill(trainer.roles, recipe_sampler(), 1.0)
    assert torch.equal(kept, bank.x0)
    # A pair is the teacher's own ODE solution of the noise that its number gives.
    index = torch.arange(20)
    again = sample(recipe_sampler(), trainer.roles.teacher, bank.noise(index))
    torch.testing.assert_close(again.float(), kept, rtol=1e-4, atol=1e-5)


def recipe_sampler() -> Any:
    from fewstep.sampling import many_step

    return many_step(3, "heun")


def test_needs_say_what_a_method_reads():
    told: dict[str, Needs] = {n: load(f"toy/{n}").method.needs() for n in NAMES}
    assert {n for n in NAMES if told[n].data} == {
        "sida", "f-distill", "uni-instruct", "gdd", "gdd-i", "ladd", "class-ratio", "joint"
    }  # fmt: skip
    assert {n for n in NAMES if told[n].pairs} == {"dmd"}
    assert {n for n in NAMES if told[n].teacher_grad} == {
        "sid", "sim", "inverse-matching", "sida", "uni-instruct", "ladd"
    }  # fmt: skip
    assert not any(told[n].jvp for n in NAMES)
    assert all(f"toy/{n}" in shipped() for n in NAMES)
