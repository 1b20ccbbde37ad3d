"""Comparisons that are killed for real; driven in a process with one thread (processes.apart), so forking is safe."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import in_child, killed

SMALL = ("before=[]", "train.guard=off", "train.batch=6", "student.width=16", "student.depth=3", "evaluate.samples=64")
ARGUMENTS = ["--budget", "updates=20", "--seeds", "2", *(x for s in SMALL for x in ("--set", s))]
ARGUMENTS += ["--set", "evaluate.teacher_steps=[1]", "--set", "train.checkpoint_every=5"]
ARGUMENTS += ["--set", "train.max_skips=3"]


def train(name: str, steps: int, *settings: str, run: Path | None = None, **options: Any) -> Any:
    """Train a small toy recipe under an account; a run directory is continued."""
    from fewstep.commands.compare.budget import Accounted
    from fewstep.recipe.store import load

    recipe = load(name, [*SMALL, *settings, f"train.steps={steps}"])
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
    account = Accounted(recipe, run, **options)
    if run is not None:
        account.resume()
    account.fit()
    return account


def drive_account(folder: Path | str) -> None:
    """whole/ under a budget of calls, and cut/ killed on the way and continued twice. Prints the accounts."""
    from fewstep.commands.compare.budget import Budget

    folder = Path(folder)
    budget = Budget("calls", 41 * 18)
    settings = ("method.teacher_steps=1", "train.checkpoint_every=7", "train.ema=[0.9]")

    def cut(account: Any) -> None:
        if account.trainer.progress.done == 19:
            os.kill(os.getpid(), signal.SIGKILL)

    def go(name: str, **options: Any) -> list[float]:
        account = train("toy/kd", 60, *settings, run=folder / name, budget=budget, **options)
        return [account.trainer.progress.done, account.spent.calls, account.spent.seconds]

    told = {"whole": go("whole")}
    assert killed(in_child(lambda: go("cut", watch=cut)))
    told |= {"again": go("cut"), "finished": go("cut")}
    print(json.dumps(told))


def drive_compare(folder: Path | str, *recipes: str) -> None:
    """killed/ gets a SIGKILL in the second run and is continued; straight/ is left alone. Runs are forked."""
    from fewstep.cli import main
    from fewstep.commands.compare import compare
    from fewstep.train.trainer import Trainer

    folder = Path(folder)
    compare.start_method = lambda _: multiprocessing.get_context("fork")

    def run(out: str, *more: str, only: tuple[str, ...] = recipes) -> None:
        with pytest.raises(SystemExit) as left:
            main(["compare", *only, *ARGUMENTS, "--out", str(folder / out), *more])
        assert left.value.code == 0

    save, struck = Trainer.save, folder / "struck"

    def strike(self: Any, *rest: Any) -> None:
        """Kill the process that compares when the second run has its third checkpoint."""
        save(self, *rest)
        if self.run.parts[-2:] == ("toy-kd", "seed-1") and self.progress.done == 15 and not struck.exists():
            struck.touch()
            os.kill(os.getppid(), signal.SIGKILL)

    Trainer.save = strike  # type: ignore[method-assign]
    assert killed(in_child(lambda: run("killed")))
    time.sleep(0.5)  # the orphaned run sees that nobody waits for it
    print(json.dumps(sorted(str(p.relative_to(folder / "killed")) for p in folder.rglob("result.json"))))
    run("killed", "--resume")
    run("straight", only=recipes[:2])
