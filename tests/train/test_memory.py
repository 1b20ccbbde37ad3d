"""Out of memory: a whole checkpoint where the step had changed nothing, one line with the setting that saves most."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import contents, records, same, tiny, train

from fewstep.commands import memory
from fewstep.commands.memory import ANEW, best_way, explained
from fewstep.commands.plan import Plan
from fewstep.config import UserError
from fewstep.recipe.store import load
from fewstep.train.log import Meter
from fewstep.train.loop import Loop
from fewstep.train.memory import OutOfMemory, is_out_of_memory
from fewstep.train.state import checkpoints
from fewstep.train.trainer import Trainer

SHORT = ("before.0.steps=6", "train.steps=12", "train.checkpoint_every=6", "train.keep=3", "optim.default.decay=constant")
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
)


def failing_at(monkeypatch: pytest.MonkeyPatch, step: int, turn: int, error: BaseException) -> None:
    """Updates of one turn of one step fail after they have computed their losses."""
    update = Loop.update

    def failing(self: Loop, *args: Any) -> bool:
        if self.progress.done == step and args[3][0] >= turn:
            self.meter.add("loss", 1e9)
            raise error
        return update(self, *args)

    monkeypatch.setattr(Loop, "update", failing)


def test_only_running_out_of_memory_is_that():
    assert all(map(is_out_of_memory, ERRORS))
    for other in (RuntimeError("shapes differ"), ValueError("can't allocate memory"), KeyError("memory")):
        assert not is_out_of_memory(other)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_the_last_good_step_is_saved_and_goes_on_bit_for_bit(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Weights, moments, averages and log of a run that failed and went on are those of one that did not fail."""
    reference = tmp_path / "reference"
    train(reference, *SHORT)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        failing_at(patch, 9, 0, error)
        with pytest.raises(
            OutOfMemory, match=r"out of memory in step 10, batch 24; the last checkpoint is step-00000009"
        ):
            train(run, *SHORT)
    assert [p.name for p in checkpoints(run / "checkpoints")] == ["step-00000006", "step-00000009"]
    train(run, *SHORT)
    ends = [contents(checkpoints(r / "checkpoints")[-1]) for r in (reference, run)]
    assert same(*ends) == []
    assert same(records(reference), records(run)) == []


def test_a_step_that_has_changed_weights_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The critic of step 10 runs out when the student has moved: what is in memory is of no step."""
    run = tmp_path / "run"
    failing_at(monkeypatch, 9, 1, ERRORS[0])
    with pytest.raises(OutOfMemory, match="in step 10, batch 24; the last checkpoint is step-00000006"):
        train(run, *SHORT)
    assert [p.name for p in checkpoints(run / "checkpoints")] == ["step-00000006"]


def test_other_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failing_at(monkeypatch, 2, 0, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        train(tmp_path / "run", *SHORT)
    monkeypatch.undo()
    failing_at(monkeypatch, 0, 0, ERRORS[0])
    with pytest.raises(OutOfMemory, match="in step 1, batch 24; there is no checkpoint yet"):
        Trainer(tiny(*SHORT), None, cpu=True).fit()


def test_readings_of_a_failed_step_are_dropped():
    meter = Meter()
    meter.add("a", 1.0)
    mark = meter.mark()
    meter.add("a", 5.0)
    meter.add("b", 7.0)
    meter.back(mark)
    assert meter.values() == {"a": [1.0]}


def test_the_line_names_what_saves_most_and_its_command_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Against the ways of `plan` an adapter in the place of a full critic counts too; the command's settings load."""

    def planned(recipe: Any, processes: int = 1, *, ways: bool = True) -> Plan:
        total = 1000 if recipe.critic.name == "copy" else critic
        return Plan({}, {}, total, 8, (("train.checkpointing=true", 800),) if ways else ())

    monkeypatch.setattr(memory, "plan", planned)
    settings = ["train.batch=8", "critic={name: copy, of: teacher}", "student={name: copy, of: teacher}"]
    recipe = load("digits-dmd2", settings)
    critic = 600
    assert best_way(recipe) == (ANEW, 600, 1000)
    critic = 900
    found = best_way(recipe)
    assert found == ("train.checkpointing=true", 800, 1000)
    setting, less, now = found
    monkeypatch.setattr(memory, "best_way", lambda *_: found)
    with (
        pytest.raises(UserError) as told,
        explained("digits-dmd2", settings, recipe, tmp_path / "run"),
    ):
        raise ERRORS[1]
    text = str(told.value)
    assert "\n" not in text
    assert text.startswith(f"out of memory while the networks were built. {setting} saves most, ")
    assert f"fewstep run digits-dmd2 {settings[0]}" in text
    assert "--from" not in text  # nothing was trained
    load("digits-dmd2", [*settings, setting])
    load("digits-dmd2", [*settings, ANEW])
    monkeypatch.setattr(memory, "best_way", lambda *_: ("optim.*.bits=8", less, now))
    line = memory._advice("digits-dmd2", settings, recipe, tmp_path / "run", 1)
    each = [s for s in shlex.split(line.partition("plan`: ")[2]) if s.startswith("optim.")]
    assert {o.bits for o in load("digits-dmd2", [*settings, *each]).optim.values()} == {8}
    monkeypatch.setattr(memory, "best_way", lambda *_: 1 / 0)
    assert memory._advice("digits-dmd2", [], recipe, tmp_path, 1) == "See `fewstep plan` for what saves memory"
    with pytest.raises(KeyError), explained("digits-dmd2", settings, recipe, tmp_path):
        raise KeyError("x")
