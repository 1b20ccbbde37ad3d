"""A tiny run whose student is spoiled on purpose after so many updates: what the guard must notice and mend."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load
from fewstep.train import resume, state
from fewstep.train.loop import Loop
from fewstep.train.trainer import Hooks, Trainer

SHORT = (
    "student.width=32",
    "student.depth=3",
    "before.0.steps=40",
    "before.0.method.weight=x0",
    "train.steps=80",
    "train.batch=64",
    "train.ema=[0.9]",
    "train.log_every=4",
    "train.readings_every=4",
    "train.checkpoint_every=5",
    "train.sample_every=0",
    "evaluate.samples=64",
    "evaluate.teacher_steps=[1]",
)
"""toy/dmd2 with a reading every fourth update; alarms need two beyond their line."""
ONSET = 70
"""Steps done before the student is spoiled."""
Spoil = Callable[[torch.Tensor], torch.Tensor]


def short(*settings: str) -> Recipe:
    return load("toy/dmd2", [*SHORT, *settings])


def spoiled(bias: Callable[[float], float], onset: int = ONSET) -> Callable[[Trainer], None]:
    """Adds to the student's last bias after each update from `onset` on, by the student's rate over its first one.

    So a lower rate spoils less, as it does a diverging run.
    """

    def after(trainer: Trainer) -> None:
        if trainer.progress.done < onset or trainer.progress.stage == 0:
            return
        optimizer = trainer.loop.optim["student"]
        share = optimizer.specs[0].lr / trainer.recipe.optimizer("student").lr
        with torch.no_grad():
            last = [p for p in trainer.roles.student.parameters() if p.shape == (2,)][-1]
            last += bias(share)

    return after


def start(run: Path | None, *settings: str, bias: Callable[[float], float] = lambda share: 0.0) -> Trainer:
    """The run's trainer, at its newest checkpoint where there is one; `lines` holds what the guard says."""
    lines: list[str] = []
    trainer = Trainer(short(*settings), run, cpu=True)
    spoil = spoiled(bias)
    step = trainer.loop.step

    def spoiling(stage: Any) -> None:
        step(stage)
        spoil(trainer)

    trainer.loop.step = spoiling  # type: ignore[method-assign]
    trainer.hooks = Hooks(on_guard=lines.append)
    trainer.lines = lines  # type: ignore[attr-defined]
    if run is not None:
        trainer.resume()
    return trainer


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_points() -> dict[str, Callable[[], None]]:
    """Moments of a return at which the process dies, by what has just been done."""

    def later_ones_partly_gone() -> None:
        set_aside, count = resume.set_aside, [0]

        def stop(path: Path) -> None:
            set_aside(path)
            count[0] += 1
            if count[0] == 2:
                kill()

        resume.set_aside = stop  # type: ignore[assignment]

    def best_one_loaded() -> None:
        save = resume.save

        def stop(loop: Loop, run: Path, guard: Any = None) -> None:
            if guard and guard["acts"]:
                kill()
            save(loop, run, guard)

        resume.save = stop  # type: ignore[assignment]

    def best_one_set_aside() -> None:
        set_aside = state.set_aside

        def stop(path: Path) -> None:
            again = (path.parent / f".{path.name}.{os.getpid()}.tmp").is_dir()
            set_aside(path)
            if again:
                kill()

        state.set_aside = stop  # type: ignore[assignment]

    def best_one_written() -> None:
        stand = Trainer._stand

        def stop(self: Trainer) -> None:
            if self.guard.acts:
                kill()
            stand(self)

        Trainer._stand = stop  # type: ignore[method-assign]

    points = (later_ones_partly_gone, best_one_loaded, best_one_set_aside, best_one_written)
    return {f.__name__: f for f in points}
