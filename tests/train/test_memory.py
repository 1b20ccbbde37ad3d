"""Out of memory: a whole checkpoint where the step had changed nothing, one line with the setting that saves most."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_runs import TINY, contents, records, same, tiny, train

from fewstep.commands import memory
from fewstep.commands.claim import prepare
from fewstep.commands.memory import ANEW, explained, ways
from fewstep.commands.plan import Plan
from fewstep.config import UserError
from fewstep.networks import code
from fewstep.recipe.store import load
from fewstep.train.log import Meter
from fewstep.train.loop import Loop
from fewstep.train.memory import OutOfMemory, is_out_of_memory
from fewstep.train.resume import newest_of, refuses
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


def planned(critic: int, *found: tuple[str, int]) -> Any:
    """A plan of 1,000 bytes, or of `critic` where the critic is no copy, with these ways."""

    def plan(recipe: Any, processes: int = 1, *, ways: bool = True) -> Plan:
        total = 1000 if recipe.critic.name == "copy" else critic
        return Plan({}, {}, total, 8, tuple(found) if ways else ())

    return plan


def command(line: str) -> list[str]:
    """The command that a line ends with, as a shell reads it."""
    assert "\n" not in line
    return shlex.split(line.partition("plan`: ")[2])


def test_an_adapter_in_the_place_of_a_full_critic_counts_too(monkeypatch: pytest.MonkeyPatch):
    settings = ["train.batch=8", "critic={name: copy, of: teacher}", "student={name: copy, of: teacher}"]
    recipe = load("digits-dmd2", settings)
    for critic, first in ((600, (ANEW, 600)), (900, ("train.checkpointing=true", 800))):
        monkeypatch.setattr(memory, "plan", planned(critic, ("train.checkpointing=true", 800)))
        now, found = ways(recipe)
        assert (now, found[0], len(found)) == (1000, first, 2)
    assert refuses(load("digits-dmd2", [*settings, ANEW]), recipe).startswith("its critic is copy, this recipe's lora")


def test_the_line_names_what_saves_most_and_its_command_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = ["train.batch=8"]
    recipe, run = load("toy/dmd2", settings), tmp_path / "run"
    monkeypatch.setattr(memory, "plan", planned(1000, ("optim.*.bits=8", 700), ("train.offload=true", 800)))
    with pytest.raises(UserError) as told, explained("toy/dmd2", settings, recipe, run):
        raise ERRORS[1]
    text = str(told.value)
    assert text.startswith("out of memory while the networks were built. optim.*.bits=8 saves most, 0 -> 0 MiB by ")
    given = command(text)
    assert given[:4] == ["fewstep", "run", "toy/dmd2", "train.batch=8"]
    assert given[-2:] == ["--out", f"{run}-2"]  # nothing was trained, so there is nothing to go on from
    assert {o.bits for o in load("toy/dmd2", given[3:-2]).optim.values()} == {8}
    (tmp_path / "run-2").mkdir()
    assert command(memory._advice("toy/dmd2", settings, recipe, run, 1))[-1] == f"{run}-3"
    monkeypatch.setattr(memory, "ways", lambda *_: 1 / 0)
    assert memory._advice("toy/dmd2", [], recipe, tmp_path, 1) == "See `fewstep plan` for what saves memory"
    with pytest.raises(KeyError), explained("toy/dmd2", settings, recipe, tmp_path):
        raise KeyError("x")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has not done all its steps."""
    run = tmp_path_factory.mktemp("memory") / "run"
    prepare(tiny(*SHORT), run, resume=False, force=False)
    train(run, *SHORT)
    shutil.rmtree(run / "checkpoints" / "step-00000018")
    return run


REFUSED = ("train.ema=[0.9]", "optim.*.bits=8")
WAYS = ("train.checkpointing=true", "train.precision=bf16", "train.accumulate=2", "train.offload=true", *REFUSED)


@pytest.mark.parametrize("best", WAYS)
def test_the_command_after_training_is_one_that_from_accepts(best: str, stopped: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the ways, the most saving one that leaves the checkpoint what it is; with none of them the run begins anew."""
    settings, recipe = [*TINY, *SHORT], tiny(*SHORT)
    monkeypatch.setattr(memory, "plan", planned(1000, (best, 500), ("train.offload=true", 900)))
    given = command(memory._advice("toy/dmd2", settings, recipe, stopped, 1))
    assert given[3 + len(settings)] == ("train.offload=true" if best in REFUSED else best)
    out, begin = given.index("--out"), given.index("--from")
    assert given[begin + 1] == str(stopped)
    AcceleratorState._reset_state(True)  # a process has one precision otherwise
    try:
        again = Trainer(load("toy/dmd2", given[3:out]), None, cpu=True)
        again.go_on_from(newest_of(Path(given[begin + 1])))
    finally:
        AcceleratorState._reset_state(True)
    assert again.progress.done == 12
    if best in REFUSED:
        monkeypatch.setattr(memory, "plan", planned(1000, (best, 500)))
        given = command(memory._advice("toy/dmd2", settings, recipe, stopped, 1))
        assert "--from" not in given
        other = load("toy/dmd2", given[3 : given.index("--out")])
        assert refuses(other, recipe)
        if "ema" in best:
            with pytest.raises(
                UserError, match=r"run: has the averages train\.ema=\[0\.9, 0\.99\], this recipe \[0\.9\]"
            ):
                Trainer(other, None, cpu=True).go_on_from(newest_of(stopped))


def test_a_command_that_repeats_a_trusted_one_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = [f"teacher.wrapper='{tmp_path / 'mine.py'}:Mine'"]
    recipe = load("digits-dmd2", settings)
    monkeypatch.setattr(memory, "plan", planned(1000, ("train.offload=true", 900)))
    for trusted in (False, True):
        monkeypatch.setattr(code, "_everything", [trusted])
        given = command(memory._advice("digits-dmd2", settings, recipe, tmp_path / "run", 1))
        assert ("--trust-code" in given) == trusted
