"""A recipe trained in a run directory: its stages in order, the log, checkpoints, hooks and signals."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.config import UserError
from fewstep.kernels import use_fewstep_attention
from fewstep.networks.roles import Roles
from fewstep.recipe.schema import Recipe, Stage
from fewstep.train import resume
from fewstep.train.claim import claim, held
from fewstep.train.log import Log, start_trackers
from fewstep.train.loop import Loop
from fewstep.train.memory import OutOfMemory, guarded
from fewstep.train.parallel import full
from fewstep.train.session import Session
from fewstep.train.state import Progress, checkpoints

Hook = Callable[["Trainer"], None]


@dataclass
class Hooks:
    """Called by a trainer, with itself; None is nothing.

    >>> seen = []
    >>> recipe = fewstep.load("toy/dmd2", before=[], copy={}, train={"steps": 3, "batch": 16})
    >>> hooks = fewstep.Hooks(on_step=lambda trainer: seen.append(trainer.progress.done))
    >>> fewstep.Trainer(recipe, hooks=hooks, cpu=True).fit()
    >>> seen
    [1, 2, 3]
    """

    on_sample: Hook | None = None
    """Every `sample_every` steps and at the end, on the main process (on every one when sharded)."""
    on_eval: Hook | None = None
    """Every `eval_every` steps, on the main process (on every one when sharded)."""
    on_step: Hook | None = None
    """After every step (progress display)."""
    on_save: Hook | None = None
    """Before a checkpoint is written."""
    on_state: Callable[[Roles], None] | None = None
    """After a stage's own buffers were made, with the roles."""
    on_stop: Callable[[Trainer, bool], None] | None = None
    """Within the handler of SIGTERM or Ctrl-C; True for the second one, which stops at once."""


class Trainer:
    """Trains a recipe in a run directory, which `open_product` and every command then open.

    Args:
        recipe: checked recipe, of `fewstep.load`.
        run: directory for recipe.yaml, log.jsonl and checkpoints/; None keeps everything in memory.
        hooks: what is called on the way.
        cpu: stay on the CPU where there is a GPU.

    Raises:
        UserError: roles that cannot be built, a directory that is not fewstep's, in which another recipe was trained or
            in which another process trains.

    >>> recipe = fewstep.load("toy/dmd2", before=[], copy={}, train={"steps": 2, "batch": 16})
    >>> trainer = fewstep.Trainer(recipe, "runs/two-steps", cpu=True)
    >>> trainer.resume()  # nothing to go on from yet
    False
    >>> trainer.fit()
    >>> trainer.progress.done
    2
    >>> fewstep.open_product("runs/two-steps").draw(5).shape
    torch.Size([5, 2])
    """

    def __init__(
        self, recipe: Recipe, run: str | Path | None = None, *, hooks: Hooks | None = None, cpu: bool = False
    ) -> None:
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipe: expected a Recipe, which fewstep.load reads, not a {type(recipe).__name__}")
        self.recipe, self.hooks = recipe, hooks or Hooks()
        self.session = Session(recipe, cpu=cpu)
        self.loop = Loop(self.session, self._made_state)
        self.accelerator, self.data = self.session.accelerator, self.session.data
        self.run: Path | None = None
        self.log: Log | None = None
        self.last_record: dict[str, Any] = {}
        self.changed: list[str] = []
        self._stop, self._newest = False, ""
        self._claimed = run is not None and self.accelerator.is_main_process
        if run is not None:
            if self._claimed:
                with held(Path(run)):
                    claim(recipe, Path(run))
            self.accelerator.wait_for_everyone()
            self.attach(run)

    def attach(self, run: str | Path) -> None:
        """Log and save from now on in a directory that the caller has claimed and holds (`fewstep.train.claim`)."""
        self.run = Path(run)
        self.log = Log(self.run / "log.jsonl")
        _ = self.session.origins  # taken now: files that change while it trains are not what was read

    @property
    def roles(self) -> Roles:
        return self.session.roles

    @property
    def device(self) -> torch.device:
        return self.session.device

    @property
    def product(self) -> nn.Module:
        """The weights that are sampled, evaluated and exported."""
        return self.session.product

    @property
    def progress(self) -> Progress:
        return self.loop.progress

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.recipe.stages())

    def fit(self) -> None:
        """Train to the end of the last stage.

        SIGTERM and Ctrl-C save a checkpoint at the next step's end; a second one stops at once, without.

        Raises:
            UserError: the directory holds an earlier training that was not resumed, or another process trains there.
        """
        with self._alone():
            if self._claimed and self._newest_checkpoint() != self._newest:
                raise UserError(f"{self.run}: holds an earlier training; call resume() before fit(), or give another")
            if self._claimed and self.log:
                self.log.cut(self.progress.done)  # of a training that ended before its first checkpoint
            self._fit()

    def _alone(self) -> AbstractContextManager[None]:
        """The directory kept to this process, where its caller does not keep it."""
        return held(self.run) if self._claimed and self.run is not None else nullcontext()

    def _newest_checkpoint(self) -> str:
        found = [] if self.run is None else checkpoints(self.run / "checkpoints")
        return found[-1].name if found else ""

    def _fit(self) -> None:
        names, told = self.recipe.train.trackers, self.accelerator
        if names and self.run is not None and told.is_main_process and not told.trackers:
            start_trackers(told, names, self.run, self.progress.done)
        main_thread = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if main_thread else ()
        before = [(s, signal.signal(s, self._ask_to_stop)) for s in signals]
        try:
            stages = self.recipe.stages()
            while self.progress.stage < len(stages) and not self._stop:
                # "auto" needs no context here: a method's tangent enters one, and the rest is torch's own.
                impl = self.recipe.train.attention
                with nullcontext() if impl == "auto" else use_fewstep_attention(impl):
                    self._run_stage(stages[self.progress.stage])
        finally:
            for s, handler in before:
                signal.signal(s, handler)
        if self._stop:
            raise KeyboardInterrupt

    def _ask_to_stop(self, *_: Any) -> None:
        again, self._stop = self._stop, True
        if self.hooks.on_stop:
            self.hooks.on_stop(self, again)
        if again:
            raise KeyboardInterrupt

    def _made_state(self, roles: Roles) -> None:
        if self.hooks.on_state:
            self.hooks.on_state(roles)

    def _run_stage(self, stage: Stage) -> None:
        train, p = self.recipe.train, self.progress
        if p.step == 0 and not guarded(self.loop, partial(self.loop.begin, stage)):
            self._out_of_memory(whole=False)
        while p.step < stage.steps:
            started = time.perf_counter()
            if not guarded(self.loop, partial(self.loop.step, stage)):
                self._out_of_memory(whole=not self.loop.touched)
            p.step, p.done = p.step + 1, p.done + 1
            self.loop.meter.add("seconds", time.perf_counter() - started)
            ended, number = p.step == stage.steps, p.stage
            if ended:
                p.stage, p.step = p.stage + 1, 0
            finished = p.done == self.total_steps
            if p.done % train.log_every == 0 or finished:
                self._record(number)
            self._call_hooks(finished)
            self._stop = self.session.any(self._stop)
            if p.done % train.checkpoint_every == 0 or finished or self._stop:
                self.save()
            if ended or self._stop:
                return

    def _out_of_memory(self, whole: bool) -> None:
        """Save what is whole, then UserError. One of several processes cannot: the others are in another place."""
        done = self.progress.done
        if whole and done and self.run is not None and self.accelerator.num_processes == 1:
            self.save()
        held = [] if self.run is None else checkpoints(self.run / "checkpoints")
        kept = f"the last checkpoint is {held[-1].name}" if held else "there is no checkpoint yet"
        raise OutOfMemory(f"out of memory in step {done + 1}, batch {self.recipe.train.batch}; {kept}")

    def _call_hooks(self, finished: bool) -> None:
        train, done, hooks = self.recipe.train, self.progress.done, self.hooks
        if hooks.on_step:
            hooks.on_step(self)
        # The parts of a sharded network act together.
        if not (self.accelerator.is_main_process or self.session.sharded):
            return
        if hooks.on_sample and train.sample_every and (done % train.sample_every == 0 or finished):
            hooks.on_sample(self)
        if hooks.on_eval and train.eval_every and done % train.eval_every == 0:
            hooks.on_eval(self)

    def _record(self, stage: int) -> None:
        """A line of the log, of the stage that the last step was of."""
        p, optim = self.progress, self.loop.optim
        means = self.session.means({k: [v] for k, v in sorted(self.loop.meter.take().items())})
        readings = {k: v for k, (v,) in means.items()}
        rates = {f"lr/{n}": o.rate(s) for o in optim.values() for n, s in zip(o.names, o.specs, strict=True)}
        self.last_record = {"done": p.done, "stage": stage, "skips": p.skipped, **readings, **rates}
        if self.accelerator.is_main_process:
            if self.log:
                self.log.write(self.last_record)
            if self.accelerator.trackers:
                self.accelerator.log(self.last_record, step=p.done)

    def save(self) -> None:
        """Write a checkpoint on the main process."""
        if self.run is None:
            return
        if self.hooks.on_save:
            self.hooks.on_save(self)
        resume.save(self.loop, self.run)
        self._newest = self._newest_checkpoint()

    def resume(self) -> bool:
        """Continue from the newest complete checkpoint; False when there is none.

        `changed` then holds lines about data that is another than it was, which the log notes too.
        """
        if self.run is None:
            raise UserError("run: this trainer has no directory to resume from; give it one")
        with self._alone():
            self._newest = self._newest_checkpoint()
            told = resume.resume(self.loop, self.run)
            self.changed = told or []
            if self.log and self.accelerator.is_main_process:
                self.log.cut(0 if told is None else self.progress.done)
                for line in self.changed:
                    self.log.write({"done": self.progress.done, "note": line})
        return told is not None

    def go_on_from(self, path: str | Path) -> None:
        """Start from another run, or one of its checkpoints, with this recipe's settings.

        `changed` then holds lines about files that are others than that run's.

        Raises:
            UserError: it is neither, or its roles, networks, averages or stages are others than this recipe's.
        """
        self.changed = resume.go_on_from(self.loop, resume.newest_of(Path(path)))


def gradients(parameters: list[nn.Parameter]) -> Tensor:
    """All gradients as one vector, zeros where there is none; for tests and readings."""
    return torch.cat([full(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
