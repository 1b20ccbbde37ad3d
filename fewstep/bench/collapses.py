"""Collapses provoked in a training of digits, and what `train.guard=restore` makes of them, in FD of its product.

python -m fewstep.bench.collapses [NAMES] [--recipe digits-dmd2] [--onset 200] [--updates 150] [--eval-every 0]
    [--out assets/collapses.jsonl]

One training up to the onset, and on to the end without a collapse; from the onset's checkpoint on each collapse is
provoked twice: with `warn`, which tells the update of the first alarm, the FD there and the FD at the end, and with
`restore`. The product is what the run would be left with, the average of the student's weights: the student itself swings
between 2.5 and 7 from one update to the next while all is well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.draws import Draws
from fewstep.commands.judge import judge_of
from fewstep.commands.measure import measure
from fewstep.files import atomic_path, commit
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load
from fewstep.train.guard import Stopped, best_of
from fewstep.train.product import product_of
from fewstep.train.state import read_guard
from fewstep.train.trainer import Hooks, Trainer

DARKER = 0.1
"""What each update takes from the student's last bias under `darkening`; a fifth of it the training makes up for."""
FASTER = 20
"""Factor on the student's rate under `rate`."""
PLAIN = Draws.normal


@dataclass(frozen=True)
class Collapse:
    """One provoked collapse. FDs are of the product, the average of the student's weights."""

    name: str
    recipe: str
    onset: int
    """Updates done before it is provoked."""
    alarm: str
    """The first alarm under `warn`, empty without one."""
    after: int
    """Updates from the onset to it, -1 without one."""
    before: float
    """FD at the onset."""
    error: float
    """One standard error of it."""
    healthy: float
    """FD at the end of the training without a collapse."""
    at_alarm: float | None
    unguarded: float
    """FD at the end of the unguarded training."""
    restored: float
    returns: int
    stopped: bool
    """The guard has ended the training at its best checkpoint."""
    commit: str
    by: str = "readings"
    """What the best checkpoint was told by: readings, or the metric of `--eval-every`."""


def rate(trainer: Trainer) -> None:
    """The student's rate times FASTER, which `settings` sets."""


def critic(trainer: Trainer) -> None:
    """The critic has had its last update."""
    update = trainer.loop.update

    def uncritical(turn: Any, *rest: Any) -> bool:
        return True if "critic" in turn.updates else update(turn, *rest)

    trainer.loop.update = uncritical  # type: ignore[method-assign]


def darkening(trainer: Trainer) -> None:
    """A bias that grows with each update, in proportion to the student's rate."""
    step = trainer.loop.step

    def darker(stage: Any) -> None:
        step(stage)
        with torch.no_grad():
            share = trainer.loop.optim["student"].specs[0].lr / trainer.recipe.optimizer("student", stage).lr
            list(trainer.roles.student.parameters())[-1].sub_(DARKER * share)

    trainer.loop.step = darker  # type: ignore[method-assign]


def copied_noise(trainer: Trainer) -> None:
    """Every row of a batch draws the first row's noise."""

    def first(self: Draws, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        noise = PLAIN(self, *shape, dtype=dtype)
        return noise[:1].expand_as(noise).clone()

    Draws.normal = first  # type: ignore[method-assign]


COLLAPSES = {f.__name__: f for f in (rate, critic, darkening, copied_noise)}


@contextmanager
def plain_draws() -> Iterator[None]:
    """Noise as it is without a provoked bug."""
    now = Draws.normal
    Draws.normal = PLAIN  # type: ignore[method-assign]
    try:
        yield
    finally:
        Draws.normal = now  # type: ignore[method-assign]


def distance(trainer: Trainer) -> tuple[float, float]:
    """(FD, one standard error) of the product as it stands."""
    assert trainer.recipe.evaluate is not None
    with plain_draws():
        product = product_of(trainer.recipe, trainer.product.eval(), trainer.data, "student")
        found = measure(product, judge_of(product, trainer.recipe.evaluate))[0].distance
    return found.value, found.standard_error


def score(trainer: Trainer) -> float:
    """What the guard's best checkpoint is told by under `--eval-every`."""
    return distance(trainer)[0]


def settings(name: str, recipe: Recipe) -> list[str]:
    """Changes to the recipe that are the collapse."""
    return [f"optim.student.lr={recipe.optimizer('student').lr * FASTER}"] if name == "rate" else []


def before(name: str, run: Path, changes: list[str], onset: int) -> tuple[float, float]:
    """Train a recipe in `run` up to the onset; the product's FD there."""

    def stop(t: Trainer) -> None:
        t._stop = t.progress.done == onset

    trainer = Trainer(load(name, changes), run, hooks=Hooks(on_step=stop, on_eval=score), cpu=True)
    with suppress(KeyboardInterrupt):
        trainer.fit()
    return distance(trainer)


def provoke(name: str, recipe: Recipe, start: Path, run: Path) -> tuple[Trainer, list[tuple[int, str, float]], bool]:
    """Go on from a copy of `start` with a collapse: the trainer, alarms (update, name, FD), whether it was stopped.

    name: that of the collapse; empty for none.
    """
    shutil.copytree(start, run)
    alarms: list[tuple[int, str, float]] = []
    trainer = Trainer(recipe, None, cpu=True)
    trainer.attach(run)
    trainer.resume()

    def told(line: str) -> None:
        if "ALARM " in line:
            alarms.append((trainer.progress.done, line.partition("ALARM ")[2].partition(":")[0], distance(trainer)[0]))

    trainer.hooks = Hooks(on_guard=told, on_eval=score)
    if name:
        COLLAPSES[name](trainer)
    try:
        trainer.fit()
        stopped = False
    except Stopped:
        stopped = True
    finally:
        Draws.normal = PLAIN  # type: ignore[method-assign]
    return trainer, alarms, stopped


def collapse(
    name: str, recipe: str, changes: list[str], start: Path, onset: int, fd: tuple[float, float], healthy: float
) -> Collapse:
    """Both trainings of one collapse."""
    ends: dict[str, Any] = {}
    for mode in ("warn", "restore"):
        with tempfile.TemporaryDirectory() as folder:
            own = load(recipe, [*changes, f"train.guard={mode}"])
            own = load(recipe, [*changes, f"train.guard={mode}", *settings(name, own)])
            trainer, alarms, stopped = provoke(name, own, start, Path(folder) / "run")
            ends[mode] = distance(trainer)[0]
            if mode == "warn":
                at, alarm, there = alarms[0] if alarms else (onset - 1, "", None)
    return Collapse(
        name,
        recipe,
        onset,
        alarm,
        at - onset,
        *fd,
        healthy,
        there,
        ends["warn"],
        ends["restore"],
        len(trainer.guard.acts),
        stopped,
        commit()[:7],
        trainer.guard.by,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.bench.collapses", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*COLLAPSES, []], help="collapses; all of them when left out")
    parser.add_argument("--recipe", default="digits-dmd2")
    parser.add_argument("--onset", type=int, default=200, help="updates before the collapse is provoked")
    parser.add_argument("--updates", type=int, default=150, help="updates after it")
    parser.add_argument("--eval-every", type=int, default=0, help="updates between evaluations; 0: best by the readings")
    parser.add_argument("--out", type=Path, default=Path("collapses.jsonl"))
    given = parser.parse_args(argv)
    # All checkpoints lie a reading or two apart, as a guard that restores needs them.
    changes = [f"train.steps={given.onset + given.updates}", "train.checkpoint_every=20", "train.sample_every=0"]
    changes.append(f"train.eval_every={given.eval_every}")
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        fd = before(given.recipe, start, changes, given.onset)
        print(f"{given.recipe} at {given.onset} updates: FD {fd[0]:.2f} ± {fd[1]:.2f}", flush=True)
        whole, told, _ = provoke("", load(given.recipe, changes), start, Path(folder) / "whole")
        healthy = distance(whole)[0]
        print(f"without a collapse at the end: FD {healthy:.2f}, {len(told)} alarms", flush=True)
        best = best_of(start / "checkpoints")
        if best is None:
            raise SystemExit(f"no checkpoint of the first {given.onset} updates has a score to go back to")
        print(f"best so far: {best.name}, by {(read_guard(best) or {})['by']}", flush=True)
        for name in given.names or COLLAPSES:
            c = collapse(name, given.recipe, changes, start, given.onset, fd, healthy)
            lines = given.out.read_text().splitlines() if given.out.exists() else []
            kept = [line for line in lines if (r := json.loads(line))["name"] != name or r["by"] != c.by]
            with atomic_path(given.out) as temporary:
                temporary.write_text("\n".join([*kept, json.dumps(asdict(c))]) + "\n")
            print(c, flush=True)


if __name__ == "__main__":
    main()
