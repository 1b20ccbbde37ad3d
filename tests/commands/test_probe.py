"""`fewstep probe`: what a run trained is probed on its own data, and the line that a recipe takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calling import called

from fewstep.commands.probe import probe
from fewstep.config import UserError
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a transformer of five blocks on digits, two steps long."""
    path = tmp_path_factory.mktemp("runs") / "dit"
    student = "student={name: dit, width: 16, depth: 5, heads: 2, prediction: edm, process: {name: edm}}"
    cut = ["train.steps=2", "train.batch=8", "train.ema=[]", "train.product=student", "train.sample_every=0"]
    Trainer(load("digits-teacher", [student, *cut]), path, cpu=True).fit()
    return path


def test_a_run_is_probed_and_its_intervals_are_a_recipes(run: Path, capfd: pytest.CaptureFixture[str]):
    told = probe(str(run), samples=40, remove=2)
    assert len(told.residuals) == 5
    assert sum(v - u for u, v in told.intervals) == 2
    assert all(0 <= loss <= 1 for loss in told.losses)
    assert probe(str(run), samples=40, remove=2) == told
    # Blocks whose gates are still zero do nothing, and any run of them is free.
    whole = probe(str(run), samples=40, accept=1.0)
    assert whole.intervals
    code, out, err = called(capfd, "probe", run, "--samples", 40, "--remove", 2)
    assert code == 0, err
    line = f"5 blocks become 3: student.intervals={list(map(list, told.intervals))}"
    assert line in " ".join((out + err).split())
    pruned = load("toy/ppcl", [f"student.intervals={list(map(list, told.intervals))}"])
    assert pruned.student.intervals == tuple(told.intervals)


def test_what_cannot_be_probed_is_refused(run: Path):
    def refused(*args: Any, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            probe(*args, **options)
        return str(caught.value)

    ask: Callable[..., str] = refused
    assert ask(str(run), remove=5) == "--remove 5: there are 5 blocks; give 1 to 4"
    assert ask(str(run), samples=1) == "--samples 1: expected 2 to 100000"
    assert ask(str(run), accept=2.0) == "--accept 2: expected a loss in [0, 1]"
    assert "digits-kd: a UNet2DModel has no list of blocks" in ask("digits-kd")
    assert "has no teacher; name a run that trained one" in ask("digits-teacher")
