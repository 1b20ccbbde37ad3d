"""Switches that must not change a run: its weights with them are those without."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_teacher import make_teacher, student_settings

from fewstep.config import RecipeError, UserError
from fewstep.networks.adapters import own_state
from fewstep.recipe.store import load
from fewstep.train import switches
from fewstep.train.trainer import Trainer

LINEAR = ("optim={default: {lr: 1e-2, eps: 1e-2}}",)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "t")


def trained(teacher: Path, *settings: str) -> Trainer:
    trainer = Trainer(load("digits-dmd2", [*student_settings(teacher), *LINEAR, *settings]), cpu=True)
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def plain(teacher: Path) -> Trainer:
    return trained(teacher)


def same(a: Trainer, b: Trainer, tolerance: float) -> None:
    for role in ("student", "critic", "discriminator"):
        left, right = own_state(a.roles[role]), own_state(b.roles[role])
        assert left.keys() == right.keys()
        for key, value in left.items():
            torch.testing.assert_close(right[key], value, rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")
    for x, y in zip(a.session.ema[0].module.parameters(), b.session.ema[0].module.parameters(), strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=tolerance)


def test_checkpointing_and_offload_change_no_bit(teacher: Path, plain: Trainer):
    same(plain, trained(teacher, "train.checkpointing=true"), 0.0)
    same(plain, trained(teacher, "train.offload=true"), 0.0)


def test_channels_last_changes_the_layout_alone(teacher: Path, plain: Trainer):
    other = trained(teacher, "train.channels_last=true")
    weights = [t.roles.student.net.model.down_blocks[0].resnets[0].conv1.weight for t in (plain, other)]
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [False, True]
    same(plain, other, 2e-6)


def test_compiled_roles_train_alike(teacher: Path, plain: Trainer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(switches, "BACKEND", "aot_eager")
    seen = []
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, *a, **k: (seen.append((type(self).__name__, k)), compiled(self, *a, **k)),
    )
    same(plain, trained(teacher, "train.compile=[student]"), 2e-6)
    assert seen == [("UNet2DModel", {"backend": "aot_eager"})]


def test_roles_that_cannot_be_compiled_are_named(teacher: Path):
    for settings, message in (
        (("train.compile=[studnet]",), "role 'studnet' is not in this recipe; it has teacher, student"),
        (("train.compile=[discriminator]",), "the discriminator is a Discriminator, which has no network"),
        (
            ("student={name: lora}", "train.compile=[student]"),
            "the student is an adapter; name the role that holds",
        ),
    ):
        with pytest.raises((RecipeError, UserError), match=message):
            trained(teacher, *settings)


def test_idle_roles_leave_and_come_back_when_called(teacher: Path, monkeypatch: pytest.MonkeyPatch):
    moves: list[tuple[Any, str]] = []
    device = torch.device("cpu", 0)  # differs from "cpu", is the same memory
    monkeypatch.setattr(switches, "move", lambda module, to: moves.append((module, str(to))))
    heads = "discriminator={trunk: critic, taps: [mid], width: 8}"  # on the teacher they would call it in both turns
    recipe = load("digits-dmd2", [*student_settings(teacher), *LINEAR, heads])
    trainer = Trainer(recipe, cpu=True)
    trainer.session.offload = switches.Offload(trainer.roles, device)
    stage, name = recipe.stages()[-1], {id(m): n for n, m in trainer.roles.items()}
    trainer.loop.step(stage)
    assert moves == []  # the first turn of each kind learns
    trainer.loop.step(stage)
    told = [(name[id(m)], to) for m, to in moves]
    # The student's turn calls all four; the critic's has no use for the teacher.
    assert told == [("teacher", "cpu")]
    trainer.loop.step(stage)
    told = [(name[id(m)], to) for m, to in moves]
    assert told == [("teacher", "cpu"), ("teacher", "cpu:0"), ("teacher", "cpu")]
    assert trainer.session.offload.called[("student",)] >= {"teacher", "student", "critic"}
    assert "teacher" not in trainer.session.offload.called[("critic", "discriminator")]


def test_eight_bit_moments_ask_for_their_package(teacher: Path, monkeypatch: pytest.MonkeyPatch):
    eight = "optim={default: {lr: 1e-2, eps: 1e-2, bits: 8}}"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"need bitsandbytes, which is not installed: pip install bitsandbytes"):
        trained(teacher, eight)
    made: list[Any] = []

    class Stub(torch.optim.AdamW):
        def __init__(self, groups: Any) -> None:
            made.append(groups)
            super().__init__(groups, fused=True)

    package = types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=Stub))
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    trained(teacher, eight)
    assert len(made) == 2
    assert made[0][0]["lr"] == 1e-2


def test_came_asks_for_its_package_and_gets_sanas_constants(teacher: Path, monkeypatch: pytest.MonkeyPatch):
    came = "optim={default: {lr: 1e-2, betas: [0.9, 0.999], rule: came}}"
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match=r"came needs pytorch-optimizer, which is not installed: pip install"):
        trained(teacher, came)
    with pytest.raises(RecipeError, match="rule came has two eps of its own and no 8-bit form"):
        trained(teacher, "optim={default: {lr: 1e-2, rule: came, bits: 8}}")
    made: list[Any] = []

    class Stub(torch.optim.SGD):
        def __init__(self, groups: Any) -> None:
            made.append(groups)
            super().__init__([{"params": g["params"], "lr": g["lr"]} for g in groups])

    monkeypatch.setitem(sys.modules, "pytorch_optimizer", types.SimpleNamespace(CAME=Stub))
    trained(teacher, came)
    assert len(made) == 2
    told = {k: v for k, v in made[0][0].items() if k != "params"}
    assert told == {
        "lr": 1e-2,
        "betas": (0.9, 0.999, 0.9999),
        "eps1": 1e-30,
        "eps2": 1e-16,
        "weight_decay": 0.0,
    }


def test_a_shared_rollout_saves_one_and_keeps_its_conditions(teacher: Path, monkeypatch: pytest.MonkeyPatch):
    from fewstep.methods.dmd2 import DMD2

    counts, given = [], []
    critic_losses = DMD2.critic_losses

    def watch(self: DMD2, roles: Any, batch: Any, made: Any) -> Any:
        given.append((batch, made))
        return critic_losses(self, roles, batch, made)

    monkeypatch.setattr(DMD2, "critic_losses", watch)
    for shared in ("false", "true"):
        extra = (f"method.share_rollout={shared}", "method.critic.steps=3", "train.accumulate=2")
        trainer = Trainer(load("digits-dmd2", [*student_settings(teacher), *LINEAR, *extra]), cpu=True)
        calls: list[torch.Tensor] = []
        trainer.roles.student.register_forward_hook(lambda _m, _a, out, calls=calls: calls.append(out.x0.detach()))
        given.clear()
        trainer.loop.step(trainer.recipe.stages()[-1])
        counts.append(len(calls))
    # Two micro-batches: the student's own two calls, and those of the second and third critic update.
    assert counts == [8, 6]
    assert [made is not None for _, made in given] == [True, True, False, False, False, False]
    for k in (0, 1):
        (x, cond), batch = given[k][1], given[k][0]
        assert torch.equal(x, calls[k])
        assert not torch.equal(cond, batch.cond)
