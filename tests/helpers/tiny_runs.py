"""Shared by the run tests: a tiny DMD2 recipe with every kind of state, and processes that are killed for real."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

TINY = (
    "discriminator={taps: [mid], width: 8}",
    "method.gan.weight=0.01",
    "method.critic.steps=2",
    "method.steps=[1.0, 0.5]",
    "student.width=16",
    "student.depth=3",
    "before.0.steps=60",
    "train.steps=140",
    "train.batch=24",
    "train.ema=[0.9, 0.99]",
    "train.checkpoint_every=7",
    "train.log_every=5",
    "train.sample_every=0",
    "optim.default.decay=cosine",
    "optim.student={lr: 2e-3, warmup: 9}",
    "evaluate.samples=64",
    "evaluate.teacher_steps=[1]",
)
"""toy/dmd2 with a discriminator on the critic's trunk, two averages, two stages; checkpoints off the log's beat."""
THIRD = ("before.0.steps=20", "train.steps=45")
"""65 steps in place of 200; checkpoints still end two steps before the run does."""


def tiny(*settings: str) -> Any:
    """The tiny recipe, checked."""
    from fewstep.recipe.store import load

    return load("toy/dmd2", [*TINY, *settings])


def train(run: Path, *settings: str) -> Any:
    """Start or continue the tiny run in this process; returns the trainer."""
    from fewstep.train.trainer import Trainer

    run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(tiny(*settings), run, cpu=True)
    trainer.resume()
    trainer.fit()
    return trainer


def in_child(job: Callable[[], Any], kill_when: Callable[[], bool] | None = None, after: float = 0.0) -> int:
    """Run a job in a forked process; SIGKILL it some seconds after a condition holds. Returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            job()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if kill_when is not None:
        while not kill_when():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.002)
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def import_before_forks() -> None:
    """What every run imports on its way, once for all forks: optimisers want torch._dynamo, which takes seconds."""
    import torch._dynamo  # noqa: F401

    import fewstep.train.trainer  # noqa: F401


def drive_kills(folder: Path | str, seed: int | str, *settings: str) -> None:
    """All kills of a run, in a process of one thread (processes.apart), so that forking is safe."""
    drive_random_kills(Path(folder), int(seed), *settings, lines_in_all=13 if settings else 40)
    drive_kill_points(Path(folder), *settings)


def drive_random_kills(folder: Path, seed: int, *settings: str, lines_in_all: int, kills: int = 3) -> None:
    """reference/ without a break; killed/ with kill -9 at random moments, then left alone. Prints where they came."""
    assert in_child(lambda: train(folder / "reference", *settings)) == 0
    draw, log, left = random.Random(seed), folder / "killed" / "log.jsonl", []

    def lines() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    # By progress and not by the clock: on a busy host every kill would come before the first step.
    for goal in sorted(draw.sample(range(1, lines_in_all - 2), kills)):
        status = in_child(
            lambda: train(folder / "killed", *settings),
            lambda goal=goal: lines() >= goal,
            draw.uniform(0, 0.05),
        )
        assert killed(status) or status == 0
        if status == 0:
            break
        left.append(lines())
    assert in_child(lambda: train(folder / "killed", *settings)) == 0
    print(json.dumps({"log lines at each kill": left}))


def drive_kill_points(folder: Path, *settings: str) -> None:
    """One run per point of `save_checkpoint` and of the log at which the process dies; then it is continued."""
    from fewstep.train import log, state

    def optimizer_half_written() -> None:
        save = torch.save
        count = [0]

        def half(value: Any, path: Path) -> None:
            save(value, path)
            count[0] += 1
            if count[0] == 13:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                die()

        torch.save = half

    def before_the_rename() -> None:
        rename, count = Path.rename, [0]

        def stop(self: Path, target: Path) -> Path:
            count[0] += 1
            return die() if count[0] == 8 else rename(self, target)  # type: ignore[return-value,func-returns-value]

        Path.rename = stop  # type: ignore[assignment,method-assign]

    def while_dropping_old_ones() -> None:
        rmtree, count = state.shutil.rmtree, [0]

        def stop(path: Path, **options: Any) -> None:
            if path.name.endswith(".old.tmp"):
                count[0] += 1
                if count[0] == 6:
                    next(path.glob("student*")).unlink()
                    die()
            rmtree(path, **options)

        state.shutil = type("shutil", (), {"rmtree": staticmethod(stop)})  # type: ignore[assignment]

    def within_a_log_line() -> None:
        def write(self: Any, record: dict[str, Any]) -> None:
            line = json.dumps(record) + "\n"
            with self.path.open("a") as f:
                f.write(line[:40] if record["done"] == 45 else line)
            if record["done"] == 45:
                die()

        log.Log.write = write  # type: ignore[method-assign]

    for point in (optimizer_half_written, before_the_rename, while_dropping_old_ones, within_a_log_line):
        run = folder / point.__name__
        status = in_child(lambda point=point, run=run: (point(), train(run, *settings)))  # type: ignore[misc]
        assert killed(status), (point.__name__, status)
        print(json.dumps({point.__name__: sorted(p.name for p in (run / "checkpoints").iterdir())}))
        assert in_child(lambda run=run: train(run, *settings)) == 0  # type: ignore[misc]


def python(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that sees this folder; fails with its output when it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=1200,
        **options,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def environment() -> dict[str, str]:
    """One thread, this folder importable, the working directory not."""
    here = str(Path(__file__).parent)
    return {**os.environ, "PYTHONPATH": here, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def same(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two nested structures differ; tensors are compared bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [at]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{at}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for k in a for d in same(a[k], b[k], f"{at}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{at}: {len(a)} and {len(b)} entries"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in same(x, y, f"{at}/{i}")]
    return [] if a == b else [f"{at}: {a!r} != {b!r}"]


def contents(checkpoint: Path) -> dict[str, Any]:
    """Everything a checkpoint holds, as data."""
    from safetensors.torch import load_file

    out: dict[str, Any] = {p.stem: load_file(p) for p in checkpoint.glob("*.safetensors")}
    out |= {p.stem: torch.load(p, weights_only=True) for p in checkpoint.glob("*.pt")}
    out["progress"] = json.loads((checkpoint / "state.json").read_text())["progress"]
    return out


def records(run: Path) -> list[dict[str, Any]]:
    """The log without what a clock has written; every line must be whole."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def names(folder: Path) -> Sequence[str]:
    return sorted(p.name for p in folder.iterdir())


SPLIT = (
    "before.0.steps=2",
    "train.steps=4",
    "train.log_every=2",
    "train.checkpoint_every=100",
    # With a large eps Adam is nearly linear in the gradient: rounding does not become a whole step.
    "optim={default: {lr: 1e-2, eps: 1e-2}}",
)


def record_gradients(run: Path, *settings: str) -> list[tuple[str, torch.Tensor]]:
    """Train the tiny recipe for a few steps; the gradient vector of every optimiser step, as it was stepped."""
    from fewstep.train.optim import TurnOptimizer
    from fewstep.train.trainer import gradients

    seen: list[tuple[str, torch.Tensor]] = []
    step = TurnOptimizer.step

    def watched(self: Any) -> None:
        seen.append(("+".join(self.names), gradients(self.parameters).clone()))
        step(self)

    TurnOptimizer.step = watched  # type: ignore[method-assign]
    try:
        train(run, *SPLIT, *settings)
    finally:
        TurnOptimizer.step = step  # type: ignore[method-assign]
    return seen


def launched(folder: Path) -> None:
    """What each of two launched processes runs: a run, then one whose first process alone gets a SIGTERM."""
    from fewstep.train.trainer import Hooks, Trainer

    seen = record_gradients(folder / "two")
    rank = int(os.environ["RANK"])
    torch.save([g for _, g in seen], folder / f"gradients-{rank}.pt")

    def stop(trainer: Trainer) -> None:
        if rank == 0 and trainer.progress.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    (folder / "stopped").mkdir(exist_ok=True)
    trainer = Trainer(tiny(*SPLIT, "train.steps=50"), folder / "stopped", cpu=True, hooks=Hooks(on_step=stop))
    try:
        trainer.fit()
    except KeyboardInterrupt:
        (folder / f"stopped-{rank}.json").write_text(json.dumps(trainer.progress.done))
    trainer.accelerator.end_training()  # gloo's threads abort a process that leaves with its group open


if __name__ == "__main__":
    launched(Path(sys.argv[1]))
