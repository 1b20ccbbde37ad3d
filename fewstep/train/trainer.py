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
from fewstep.eval.protocol.evaluation import environment
from fewstep.kernels import use_fewstep_attention
from fewstep.networks.roles import Roles
from fewstep.recipe.schema import Recipe, Stage
from fewstep.train import resume
from fewstep.train.claim import claim, held, keep_recipe, read_origin, settled, write_origin
from fewstep.train.guard import RETURNS, Guard, Stopped, said, way_back
from fewstep.train.log import Log, read_log, start_trackers
from fewstep.train.loop import Loop, Refused
from fewstep.train.memory import OutOfMemory, guarded
from fewstep.train.parallel import full
from fewstep.train.session import Session
from fewstep.train.state import Progress, checkpoints, read_guard, read_state
from fewstep.train.verdicts import SKIPS, Verdict

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
    on_eval: Callable[[Trainer], float | None] | None = None
    """Every `eval_every` steps, on the main process (on every one when sharded). What it returns ranks checkpoints, less
    being better."""
    on_step: Hook | None = None
    """After every step (progress display)."""
    on_save: Hook | None = None
    """Before a checkpoint is written."""
    on_state: Callable[[Roles], None] | None = None
    """After a stage's own buffers were made, with the roles."""
    on_guard: Callable[[str], None] | None = None
    """With each line that the guard has to say."""
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
        recipe, self.hooks = settled(recipe, run), hooks or Hooks()
        self.recipe, self.session = recipe, Session(recipe, cpu=cpu)
        self.loop = Loop(self.session, self._made_state)
        self.guard = Guard(self.session)
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
            KeyboardInterrupt: after such a stop; another call goes on.
            UserError: the directory holds an earlier training that was not resumed, or another process trains there.
            Stopped: `train.guard` has ended it.
        """
        with self._alone():
            if self._claimed and self._newest_checkpoint() != self._newest:
                raise UserError(f"{self.run}: holds an earlier training; call resume() before fit(), or give another")
            if self._claimed and self.log:
                self.log.cut(self.progress.done)  # of a training that ended before its first checkpoint
            self._note_beginning()
            if line := self.guard.blind(self.log.path if self.log else None):
                self._say(line, {"done": self.progress.done, "note": line})
            self._stop = False
            self._fit()

    def _note_beginning(self) -> None:
        """recipe.yaml and origin.json of a claimed directory say what is trained from now on, and where."""
        if self.run is None or not self.accelerator.is_main_process or not (self.run / "recipe.yaml").is_file():
            return
        keep_recipe(self.recipe, self.run)
        if self._claimed:
            write_origin(self.run, {**read_origin(self.run), "environment": environment()})

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
        if p.step == 0:
            self._begin(stage)
        while p.step < stage.steps:
            started, number = time.perf_counter(), p.stage
            try:
                whole = guarded(self.loop, partial(self.loop.step, stage))
            except Refused:
                if self.guard.mode != "restore":
                    raise
                line = f"{train.max_skips} updates in a row had non-finite gradients"
                return self._go_back(Verdict("non-finite gradients", "alarm", 1.0, SKIPS, line), number)
            if not whole:
                self._out_of_memory(whole=not self.loop.touched)
            p.step, p.done = p.step + 1, p.done + 1
            self.loop.meter.add("seconds", time.perf_counter() - started)
            self._read(stage)
            ended = p.step == stage.steps
            if ended:
                p.stage, p.step = p.stage + 1, 0
            finished = p.done == self.total_steps
            alarms = self._record(number) if p.done % train.log_every == 0 or finished or self.guard.sudden else []
            if finished and not alarms and self.guard.by == "readings":
                self._end(number)
            best = self._call_hooks(finished)
            if finished and not alarms and self.guard.by == "metric":
                self._end(number)
            self._stop = self.session.any(self._stop)
            if alarms and self.guard.mode == "restore":
                return self._go_back(alarms[0], number)
            halt = bool(alarms) and self.guard.mode == "stop"
            if p.done % train.checkpoint_every == 0 or finished or self._stop or best or halt:
                self.save(number)
            if halt:
                raise Stopped(f"stopped by train.guard at step {p.done}: {alarms[0].name}; {alarms[0].sentence}")
            if ended or self._stop:
                break

    def _end(self, stage: int) -> None:
        """After returns the run ends with its best checkpoint's weights, where its own are worse."""
        done, to = self.progress.done, resume.end_at_best(self.loop, self.run, self.guard, stage)
        if to is not None:
            line = f"step {done}: no better than step {to}, the best checkpoint; it ends with that one's weights"
            self._say(line, {"done": done, "ends_with": to})

    def _begin(self, stage: Stage) -> None:
        """The start of a stage, where a guard that restores may have to come back to."""
        p = self.progress
        if self.guard.mode == "restore" and self.run is not None:
            self.save(p.stage)
        if not guarded(self.loop, partial(self.loop.begin, stage)):
            self._out_of_memory(whole=False)
        self._read(stage, first=True)

    def _read(self, stage: Stage, first: bool = False) -> None:
        def read() -> None:
            for name, value in self.guard.read(stage, self.progress, self.loop.meter, first).items():
                self.loop.meter.add(name, value)

        if not guarded(self.loop, read):
            self._out_of_memory(whole=True)

    def _out_of_memory(self, whole: bool) -> None:
        """Save what is whole, then UserError. One of several processes cannot: the others are in another place."""
        done = self.progress.done
        if whole and done and self.run is not None and self.accelerator.num_processes == 1:
            self.save()
        kept = f"the last checkpoint is {name}" if (name := self._newest_checkpoint()) else "there is no checkpoint yet"
        raise OutOfMemory(f"out of memory in step {done + 1}, batch {self.recipe.train.batch}; {kept}")

    def _call_hooks(self, finished: bool) -> bool:
        """Whether an evaluation among them says that this state is the best so far."""
        train, done, hooks, better = self.recipe.train, self.progress.done, self.hooks, False
        evaluated = bool(train.eval_every) and done % train.eval_every == 0
        if hooks.on_step:
            hooks.on_step(self)
        # The parts of a sharded network act together.
        if self.accelerator.is_main_process or self.session.sharded:
            if hooks.on_sample and train.sample_every and (done % train.sample_every == 0 or finished):
                hooks.on_sample(self)
            if hooks.on_eval and evaluated:
                better = self.guard.measured(done, hooks.on_eval(self), self.run)
        return self.session.any(better) if evaluated else False

    def _record(self, stage: int) -> list[Verdict]:
        """A line of the log, of the stage that the last step was of; the alarms that it raises."""
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
        alarms = self.guard.add(self.last_record)
        for v in alarms:
            self._say(said(v, p.done), {"done": p.done, "alarm": v.name, "value": v.value, "line": v.line})
        return alarms

    def _say(self, line: str, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            if self.log:
                self.log.write(record)
            if self.hooks.on_guard:
                self.hooks.on_guard(line)

    def _go_back(self, alarm: Verdict, stage: int) -> None:
        """Stand where the stage's best checkpoint does, with a lower rate. Stopped after RETURNS, or without one."""
        at, guard = self.progress.done, self.guard
        told = f"train.guard at step {at}: {alarm.name}; {alarm.sentence}"
        found = None if self.run is None else way_back(self.run / "checkpoints", stage)
        if self.run is None or found is None:
            self.save(stage)
            raise Stopped(f"stopped by {told}. There is no checkpoint of this stage to go back to")
        mark, again = read_guard(found), len(guard.acts) < RETURNS
        if again:
            guard.acts.append(guard.act(alarm, at, read_state(found)[0].done, stage))
            self.loop.factors = guard.rates()
        resume.go_back(self.loop, found, self.run)
        done = self.progress.done
        if again:
            # Under the same name and first of all: whoever continues from it has gone back as well.
            resume.save(self.loop, self.run, {**(mark or {}), "acts": guard.acts})
        self._newest = found.name
        self._stand()
        if not again:
            raise Stopped(
                f"stopped by {told}. It has gone back {RETURNS} times, with {guard.acts[-1]['knob']} at last; the newest "
                f"checkpoint is the stage's best one, of step {done}"
            )
        if self.hooks.on_guard and self.accelerator.is_main_process:
            self.hooks.on_guard(f"{told}. Back to step {done}, {guard.acts[-1]['knob']}")

    def _stand(self) -> None:
        """The log ends, and the guard knows it, where the loop stands."""
        if self.log is None:
            return
        if self.accelerator.is_main_process:
            self.log.cut(self.progress.done)
            noted = [r["guard"] for r in read_log(self.log.path) if "guard" in r]
            for act in self.guard.acts:
                if act["to"] <= self.progress.done and act not in noted:
                    self.log.write({"done": act["to"], "guard": act})
        self.accelerator.wait_for_everyone()
        self.guard.again(read_log(self.log.path), self.log.path.parent / "checkpoints" / self._newest)

    def save(self, stage: int | None = None) -> None:
        """Write a checkpoint on the main process; `stage` is that of the last step, left out the present one."""
        if self.run is None:
            return
        if self.hooks.on_save:
            self.hooks.on_save(self)
        p = self.progress
        resume.save(self.loop, self.run, self.guard.mark(p.done, p.stage if stage is None else stage))
        self._newest = self._newest_checkpoint()

    def resume(self) -> bool:
        """Continue from the newest complete checkpoint; False when there is none.

        `changed` then holds lines about data that is another than it was, which the log notes too.
        """
        if self.run is None:
            raise UserError("run: this trainer has no directory to resume from; give it one")
        with self._alone():
            newest = self._newest_checkpoint()
            self.guard.acts = list(((newest and read_guard(self.run / "checkpoints" / newest)) or {}).get("acts", ()))
            self.loop.factors = self.guard.rates()
            told = resume.resume(self.loop, self.run)
            self._newest = newest  # of a refused one fit() knows nothing
            self.changed = told or []
            self._stand()
            if self.log and self.accelerator.is_main_process:
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
