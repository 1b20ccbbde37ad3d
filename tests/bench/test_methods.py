"""The bench of methods counts the calls a step really makes, and repeats them as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.bench import methods as bench_methods
from fewstep.bench.methods import Call, checkpointing_memory, cost, prepare, recording, replay_of

SMALL = ["student.width=16", "student.depth=3", "train.batch=12"]


def calls_of(name: str, *settings: str) -> list[Call]:
    trainer, step = prepare(name, [*SMALL, *settings])
    step()
    return replay_of(trainer, step)[0]


def kinds(calls: list[Call]) -> list[tuple[str, bool, bool]]:
    return [(c.role, any(c.used), c.moving) for c in calls]


def test_calls_of_a_step_are_those_of_the_method() -> None:
    """DMD2 without GAN: student, teacher, critic; then twice student and critic, of which the critic learns."""
    teacher = ("teacher", False, False)
    assert kinds(calls_of("toy/dmd2", "method.critic.steps=2")) == [
        ("student", True, False), teacher, ("critic", False, False),
        ("student", False, False), ("critic", True, False),
        ("student", False, False), ("critic", True, False),
    ]  # fmt: skip
    # SiD differentiates through teacher and critic, whose weights ask for nothing.
    sid = calls_of("toy/sid", "method.critic.steps=1")
    assert sorted(kinds(sid)) == sorted(
        [("student", False, False), ("critic", True, False), ("student", True, False), ("teacher", True, False),
         ("critic", True, False)]
    )  # fmt: skip
    assert [c.trained for c in sid if c.role == "critic"] == [True, False]
    assert [c.trained for c in sid if c.role == "teacher"] == [False]


def test_a_tangent_is_counted_and_repeated_in_forward_mode() -> None:
    calls = calls_of("toy/scd")
    assert [c.moving for c in calls if c.role == "student"] == [False, True]
    assert all(torch.isfinite(a).all() for c in calls for a in c.args if isinstance(a, torch.Tensor))
    moving = next(c for c in calls if c.moving)
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(a) for a in moving.args if isinstance(a, torch.Tensor))


def test_the_replay_has_the_step_s_gradients() -> None:
    """A step's only call repeated with the same output gradient gives the same weight gradient."""
    trainer, _ = prepare("toy/dmd2", SMALL)
    net: Any = trainer.roles.student
    trainer.roles.train_only("student")
    x, t = torch.randn(12, 2), torch.linspace(0.2, 0.9, 12, dtype=torch.float64)
    with recording(trainer.roles) as calls:
        raw = net.net(x, t.float(), None)[0]
        raw.sum().backward()
    whole = [p.grad.clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = None
    (call,) = calls
    assert call.used == [True]
    trainer.roles.train_only("critic")
    call.run()
    for p, g in zip(net.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_the_table_and_its_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(bench_methods, "checkpointing_memory", lambda settings: (3.0, 2.0))
    settings = [f"--set={s}" for s in SMALL]
    bench_methods.main(["toy/cd", "toy/kd", "--rounds=1", f"--out={tmp_path / 'out.jsonl'}", *settings])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["recipe"] for r in rows] == ["toy/cd", "toy/kd", "digits-sid"]
    assert all(r["step_ms"] > 0 and r["calls_ms"] > 0 and r["ratio"] > 0 for r in rows[:2])
    printed = capsys.readouterr().out
    assert "toy/kd" in printed
    assert "SiD step, digits: 3 MiB, with activation checkpointing 2 MiB" in printed
    assert "step / " not in printed
    assert cost("toy/cd", SMALL, rounds=1).batch == 12


def test_a_step_beside_another_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(bench_methods, "checkpointing_memory", lambda settings: (3.0, 2.0))
    settings = [f"--set={s}" for s in SMALL]
    out = tmp_path / "out.jsonl"
    bench_methods.main(["toy/dmd2", "toy/cd", "--against=toy/cd", "--rounds=5", f"--out={out}", *settings])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["relative"] > 0
    assert rows[1]["relative"] > 0
    assert "step / toy/cd" in capsys.readouterr().out


def test_checkpointing_saves_memory_of_sid() -> None:
    plain, saved = checkpointing_memory(settings=["train.batch=24"])
    assert saved < 0.8 * plain
