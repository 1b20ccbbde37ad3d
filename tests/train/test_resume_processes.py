"""How a batch is split, over micro-batches or processes, changes neither gradients nor weights nor the log."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import contents, environment, record_gradients, records

TURNS = ["student"] * 2 + ["student", "critic+discriminator", "critic+discriminator"] * 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    run = tmp_path_factory.mktemp("whole") / "one"
    seen = record_gradients(run)
    assert [names for names, _ in seen] == TURNS
    assert all(float(g.norm()) > 1e-4 for _, g in seen)
    return run, [g for _, g in seen]


def agree(whole: tuple[Path, list[torch.Tensor]], run: Path, seen: list[torch.Tensor]) -> None:
    reference, expected = whole
    for turn, a, b in zip(TURNS, expected, seen, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=lambda m, turn=turn: f"{turn}: {m}")
    left, right = (contents(r / "checkpoints" / "step-00000006") for r in (reference, run))
    for name in ("student", "critic", "discriminator", "ema_0.9", "ema_0.99"):
        for key, value in left[name].items():
            torch.testing.assert_close(right[name][key], value, rtol=0, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    for a, b in zip(records(reference), records(run), strict=True):
        assert a.keys() == b.keys()
        # Health readings are spreads within a micro-batch, so they are the only ones that depend on its size.
        for key in (k for k in a if not k.startswith("health/")):
            assert b[key] == pytest.approx(a[key], rel=2e-5, abs=1e-6), key


@pytest.mark.parametrize("count", [2, 3, 4])
def test_accumulation_changes_nothing(whole: tuple[Path, list[torch.Tensor]], tmp_path: Path, count: int):
    agree(whole, tmp_path, [g for _, g in record_gradients(tmp_path, f"train.accumulate={count}")])


def test_two_processes_change_nothing_and_stop_together(whole: tuple[Path, list[torch.Tensor]], tmp_path: Path):
    # Not `accelerate launch --cpu`: without MPI it starts one process whatever --num_processes says.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tiny_runs.__file__, str(tmp_path)],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"gradients-{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    agree(whole, tmp_path / "two", first)
    # A signal to one process alone: both leave after the same step, with its checkpoint.
    assert [json.loads((tmp_path / f"stopped-{r}.json").read_text()) for r in (0, 1)] == [3, 3]
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_batch_that_cannot_be_split_is_refused(tmp_path: Path):
    from fewstep.config import RecipeError

    with pytest.raises(RecipeError, match=r"train\.accumulate: accumulate 5 must divide batch 24$"):
        tiny_runs.tiny("train.accumulate=5")


def test_the_command_of_the_readme_forms_one_group_on_a_cpu(tmp_path: Path):
    """No ACCELERATE_USE_CPU: without a group both ranks would train the whole batch into one directory."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fewstep"]
    settings = ("before=[]", "copy={}", "train.steps=4", "train.log_every=1", "train.batch=8", "train.checkpoint_every=2")
    run = tmp_path / "run"
    done = subprocess.run(
        [*command, "run", "toy/dmd2", *settings, "evaluate=null", "train.sample_every=0", "--out", str(run)],
        env={k: v for k, v in environment().items() if k != "ACCELERATE_USE_CPU"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert [r["done"] for r in records(run)] == [1, 2, 3, 4]
    assert done.stdout.count("run directory") == 1


def test_processes_that_form_no_group_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fewstep.config import UserError
    from fewstep.train.trainer import Trainer

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE says that 2 processes were started, but they form no group"):
        Trainer(tiny_runs.tiny(), None, cpu=True)
