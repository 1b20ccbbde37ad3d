"""Every recipe of the family runs: all its stages, two steps each, and its readings are numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from tiny_teacher import make_teacher

from fewstep.algebra.sampling import sample, seeded
from fewstep.export.base import PARITY
from fewstep.export.choose import export
from fewstep.methods.gdd import GDD
from fewstep.methods.method import Needs
from fewstep.networks.adapters import own_state
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load
from fewstep.train.product import open_product
from fewstep.train.trainer import Trainer

NAMES = [
    "anyflow", "cdm", "class-ratio", "decoupled-dmd", "diff-instruct", "disback", "dmd", "dmd2", "dmd2-4step",
    "dmd2-ink", "dp-dmd", "emd", "f-distill", "fd-loss", "gdd", "gdd-i", "ida", "inverse-matching", "isg", "joint",
    "ladd", "multi-student", "pg-sb", "phased-dmd", "rcm", "sid", "sida", "sim", "swiftbrush", "uni-instruct",
]  # fmt: skip


def short(name: str, *settings: str) -> Recipe:
    """A toy recipe of two steps a stage with small networks."""
    stages = len(load(name).before)
    student = "student.of.width=16" if "of" in vars(load(name).student) and name != "toy/x" else "student.width=16"
    cut = [f"before.{i}.steps=2" for i in range(stages)]
    extra = ["method.pairs=20", "method.pair_steps=3"] if name == "toy/dmd" else []
    return load(name, [*cut, *extra, student, "train.steps=2", "train.batch=16", "train.log_every=1", *settings])


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
    again.loop.begin(one.stages()[2])
    assert all(torch.equal(start[k], v) for k, v in again.roles.critic.state_dict().items())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "t")


def digits(name: str, teacher: Path, *settings: str) -> Recipe:
    """One step of a digits recipe on a tiny teacher."""
    cut = (
        "train.steps=1",
        "train.batch=6",
        "train.sample_every=0",
        "evaluate=null",
        f"teacher.path={teacher}",
    )
    return load(name, [*cut, "train.ema=[]", "train.product=student", *settings])


def test_experts_of_lora_train_one_adapter_a_phase_and_export(teacher: Path, tmp_path: Path):
    lora = "student={name: experts, of: {name: lora, of: teacher, rank: 2}, boundaries: [0.5]}"
    rate = "optim={default: {lr: 1e-2}}"
    # Two steps: in the first one the critic is the teacher, and there is nothing to learn.
    cut = ("before=[]", "train.steps=2", "method.critic.steps=1")
    recipe = digits("digits-phased-dmd", teacher, lora, rate, *cut)
    trainer = Trainer(recipe, tmp_path / "run", cpu=True)
    assert recipe.method.phase == 2
    trainer.fit()
    own = own_state(trainer.roles.student)
    assert own
    assert all("lora_" in k for k in own)
    moved = {k.split("members.")[1][0] for k, v in own.items() if "lora_B" in k and v.any()}
    assert moved == {"1"}
    product = open_product(tmp_path / "run")
    done = export(product, tmp_path / "out")
    assert done.parity <= PARITY
    # Merged, expert 1 is the teacher plus its adapter; expert 0 has not been trained yet.
    base, first, second = (
        UNet2DModel.from_pretrained(folder).state_dict()
        for folder in (teacher / "unet", tmp_path / "out" / "expert-0", tmp_path / "out" / "expert-1")
    )
    assert not any("lora" in k for k in second)
    weights = [k for k in base if "class_embedding" not in k]
    assert all(torch.equal(base[k], first[k]) for k in weights)
    assert any(not torch.equal(base[k], second[k]) for k in weights)


def test_gdd_i_on_digits_freezes_convolutions_and_moves_every_norm(teacher: Path):
    recipe = digits("digits-gdd-i", teacher, "discriminator.width=8", "optim.student={lr: 1e-3}")
    trainer = Trainer(recipe, None, cpu=True)
    before = {k: p.detach().clone() for k, p in trainer.roles.student.named_parameters()}
    trainer.fit()
    equal = {k: torch.equal(before[k], p) for k, p in trainer.roles.student.named_parameters()}
    norms = {k for k in equal if "norm" in k}
    convolutions = {k for k in equal if "conv" in k} - norms
    assert any("conv_norm_out" in k for k in norms)
    assert any("resnets.0.conv1" in k for k in convolutions)
    assert not any(equal[k] for k in norms)
    assert all(equal[k] for k in convolutions)
    assert any("conv" not in k and "norm" not in k and not same for k, same in equal.items())
    for name in ("norm", "conv_norm_out"):
        GDD(freeze=(name,)).hold(trainer.roles)
    assert not any(p.requires_grad for k, p in trainer.roles.student.named_parameters() if "norm" in k)


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
    assert "state" in trainer.session.modules()
    kept = bank.x0.clone()
    bank.fill(trainer.roles, recipe_sampler(), 1.0)
    assert torch.equal(kept, bank.x0)
    # A pair is the teacher's own ODE solution of the noise that its number gives.
    index = torch.arange(20)
    again = sample(recipe_sampler(), trainer.roles.teacher, bank.noise(index))
    torch.testing.assert_close(again.float(), kept, rtol=1e-4, atol=1e-5)


def recipe_sampler() -> Any:
    from fewstep.algebra.sampling import many_step

    return many_step(3, "heun")


def test_needs_say_what_a_method_reads():
    told: dict[str, Needs] = {n: load(f"toy/{n}").method.needs() for n in NAMES}
    assert {n for n in NAMES if told[n].data} == {
        "anyflow", "fd-loss", "sida", "f-distill", "uni-instruct", "gdd", "gdd-i", "ladd", "class-ratio", "joint", "rcm"
    }  # fmt: skip
    assert {n for n in NAMES if told[n].pairs} == {"dmd"}
    assert {n for n in NAMES if told[n].teacher_grad} == {
        "sid", "sim", "inverse-matching", "sida", "uni-instruct", "ladd"
    }  # fmt: skip
    assert {n for n in NAMES if told[n].jvp} == {"anyflow", "rcm"}
    assert all(f"toy/{n}" in shipped() for n in NAMES)
