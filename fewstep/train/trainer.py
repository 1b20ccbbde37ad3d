"""The training loop: any roles, any turns, one page. It knows no method by name."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.condition import rows as cond_rows
from fewstep.algebra.draws import Draws, fold
from fewstep.config import UserError
from fewstep.data.base import Data
from fewstep.kernels import check_device, use_fewstep_attention
from fewstep.methods.method import Turn
from fewstep.networks.adapters import enable_checkpointing, load_own_state, own_state
from fewstep.networks.roles import Roles
from fewstep.objectives.trajectory import probe
from fewstep.recipe.schema import Recipe, Stage
from fewstep.train.build import build_roles, trained_roles
from fewstep.train.ema import EMA
from fewstep.train.log import Log, Meter, check_trackers, start_trackers
from fewstep.train.optim import TurnOptimizer
from fewstep.train.parallel import clip_grad_norm, full, is_sharded, shard
from fewstep.train.state import Progress, checkpoints, load_checkpoint, read_state, save_checkpoint
from fewstep.train.switches import Offload, compile_roles, use_channels_last

Hook = Callable[["Trainer"], None]


class Trainer:
    """Trains a recipe in a run directory.

    Args:
        recipe: checked recipe.
        run: directory for log.jsonl and checkpoints/; None keeps everything in memory.
        on_sample, on_eval: called every `sample_every` and `eval_every` steps, on the main process.
        on_step: called after every step with the trainer (progress display).
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path | None = None,
        *,
        on_sample: Hook | None = None,
        on_eval: Hook | None = None,
        on_step: Hook | None = None,
        cpu: bool = False,
    ) -> None:
        self.recipe = recipe
        self.run: Path | None = None
        self.log: Log | None = None
        self.hooks = (on_sample, on_eval, on_step)
        train = recipe.train
        check_trackers(train.trackers)
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if train.precision == "bf16" else "no")
        world = self.accelerator.num_processes
        if train.batch % (world * train.accumulate):
            raise UserError(
                f"train.batch {train.batch} must be divisible by processes x train.accumulate "
                f"= {world} x {train.accumulate}"
            )
        try:
            check_device(train.attention, self.device)
        except ValueError as error:
            raise UserError(f"train.attention: {error}") from None
        if train.attention == "xformers" and any(s.method.needs().jvp for s in recipe.stages()):  # type: ignore[attr-defined]
            raise UserError("train.attention: 'xformers' has no tangent, which this method needs; use auto")
        self.data: Data = recipe.data.open()  # type: ignore[attr-defined]
        self.roles: Roles = build_roles(recipe, self.data)
        # A teacher without gradients keeps no activations, so there is nothing to save.
        through_teacher = any(stage.method.needs().teacher_grad for stage in recipe.stages())
        for name, module in self.roles.items():
            module.to(self.device)
            if train.checkpointing and (name != "teacher" or through_teacher):
                enable_checkpointing(module)
        self.ema = [EMA(self.roles.student, decay, train.ema_warmup) for decay in train.ema]
        self.sharded = train.parallel == "fsdp" and world > 1
        if self.sharded:
            shard([*self.roles.values(), *(e.module for e in self.ema)], self.device)
            self.roles = Roles(**dict(self.roles))
        if train.channels_last:
            use_channels_last([*self.roles.values(), *(e.module for e in self.ema)])
        compile_roles(self.roles, train.compile)
        self.offload = Offload(self.roles, self.device) if train.offload else None
        self.progress = Progress()
        self.optim: dict[str, TurnOptimizer] = {}
        self.meter = Meter()
        self._stop = False
        self.last_record: dict[str, Any] = {}
        if run is not None:
            self.attach(run)

    def attach(self, run: Path) -> None:
        """Log and save in this directory from now on."""
        self.run, self.log = run, Log(run / "log.jsonl")

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def product(self) -> nn.Module:
        """The weights that are sampled, evaluated and exported."""
        use_ema = self.recipe.train.product == "ema" and self.ema
        return self.ema[0].module if use_ema else self.roles.student

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.recipe.stages())

    def fit(self) -> None:
        """Train to the end of the last stage. SIGTERM and Ctrl-C save a checkpoint at the next step's end."""
        names = self.recipe.train.trackers
        if (
            names
            and self.run is not None
            and self.accelerator.is_main_process
            and not self.accelerator.trackers
        ):
            start_trackers(self.accelerator, names, self.run, self.progress.done)
        before = [
            (s, signal.signal(s, self._ask_to_stop))
            for s in (signal.SIGTERM, signal.SIGINT)
            if _main_thread()
        ]
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
        self._stop = True

    def _run_stage(self, stage: Stage) -> None:
        if self.progress.step == 0:
            self._begin(stage)
        train, p = self.recipe.train, self.progress
        on_sample, on_eval, on_step = self.hooks
        while p.step < stage.steps:
            started = time.perf_counter()
            self.step(stage)
            p.step, p.done = p.step + 1, p.done + 1
            self.meter.add("seconds", time.perf_counter() - started)
            ended = p.step == stage.steps
            if ended:
                p.stage, p.step = p.stage + 1, 0
            finished = p.done == self.total_steps
            if p.done % train.log_every == 0 or finished:
                self._record()
            if on_step:
                on_step(self)
            if (
                self.accelerator.is_main_process or self.sharded
            ):  # the parts of a sharded network act together
                if on_sample and train.sample_every and (p.done % train.sample_every == 0 or finished):
                    on_sample(self)
                if on_eval and train.eval_every and p.done % train.eval_every == 0:
                    on_eval(self)
            stop = self._agree_to_stop()
            if p.done % train.checkpoint_every == 0 or finished or stop:
                self.save()
            if ended or stop:
                return

    def _agree_to_stop(self) -> bool:
        """True on every process once one of them was asked: a signal reaches them at different steps."""
        if self.accelerator.num_processes > 1:
            asked: Any = self.accelerator.reduce(torch.tensor(float(self._stop), device=self.device), "sum")
            self._stop = bool(asked > 0)
        return self._stop

    def _begin(self, stage: Stage) -> None:
        """Fresh optimisers, the method's own state, and the weights that the stage says to copy."""
        self._make_state(stage)
        self.optim.clear()
        self.progress.optim = {}
        for target, source in stage.copy.items():
            try:
                load_own_state(self.roles[target], own_state(self.roles[source]))
            except RuntimeError:
                raise UserError(
                    f"copy: {target} and {source} are different networks; their weights cannot be copied"
                ) from None
        along = stage.method.needs().jvp  # type: ignore[attr-defined]
        if along:
            self._probe_tangent(stage, along)
        for ema in self.ema:
            ema.reset(self.roles.student)

    def _probe_tangent(self, stage: Stage, along: str) -> None:
        """Refuse to train on a forward-mode derivative that finite differences do not confirm."""
        batch = self.batch(stage, (0, 0), 0)
        process, rows = self.roles.student.process, min(len(batch), 8)
        u = torch.linspace(0.3, 0.8, rows, dtype=torch.float64, device=self.device)
        t = process.grid(u)
        cond = cond_rows(batch.cond, slice(rows))
        probe(self.roles.student, batch.noise()[:rows], t, process.grid(u / 2), cond, along=along)

    def _make_state(self, stage: Stage) -> None:
        make = stage.method.needs().state  # type: ignore[attr-defined]
        self.roles = self.roles.with_state(make(self.data).to(self.device) if make else None)

    def optimizer(self, updates: tuple[str, ...], stage: Stage, times: int) -> TurnOptimizer:
        """The one optimiser of a set of roles; a role in two sets is refused."""
        key = "+".join(updates)
        if key not in self.optim:
            for other in self.optim.values():
                shared = set(other.names) & set(updates)
                if shared:
                    raise ValueError(
                        f"{shared.pop()} would be stepped by two optimisers: {other.names}, {updates}"
                    )
            specs = {name: self.recipe.optimizer(name) for name in updates}
            self.optim[key] = TurnOptimizer(self.roles, updates, specs, stage.steps * times)
        return self.optim[key]

    def step(self, stage: Stage) -> None:
        """All turns of one step."""
        student_moved = False
        for number, turn in enumerate(stage.method.turns(self.roles, self.progress.step)):  # type: ignore[attr-defined]
            self.roles.train_only(*turn.updates)
            optimizer = self.optimizer(turn.updates, stage, turn.times)
            if self.offload:
                self.offload.begin(turn.updates, self.optim)
            for repeat in range(turn.times):
                moved = self._update(turn, optimizer, stage, (number, repeat))
                student_moved |= moved and "student" in turn.updates
        if student_moved:
            for ema in self.ema:
                ema.update(self.roles.student)

    def _update(self, turn: Turn, optimizer: TurnOptimizer, stage: Stage, place: tuple[int, int]) -> bool:
        """One optimiser step over all micro-batches; False when it was refused as non-finite."""
        count = self.recipe.train.accumulate
        for micro in range(count):
            batch = turn.batch(micro) or self.batch(stage, place, micro)
            with self.accelerator.autocast():
                for losses in turn.losses(batch):
                    (losses.total() / count).backward()
                    for name, value in {**losses, **losses.log}.items():
                        self.meter.add(name, value)
        self._reduce(optimizer.parameters)
        norm = clip_grad_norm(optimizer.parameters, self.recipe.train.clip)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.meter.add(f"grad_norm/{'+'.join(turn.updates)}", norm)
            optimizer.step()
        else:
            self._refuse(turn, optimizer)
        optimizer.zero()
        return finite

    def batch(self, stage: Stage, place: tuple[int, int], micro: int) -> Batch:
        """The micro-batch of this process: rows of one global batch that does not depend on how it is split."""
        train, p = self.recipe.train, self.progress
        share = train.batch // self.accelerator.num_processes
        size = share // train.accumulate
        first = self.accelerator.process_index * share + micro * size
        index = torch.arange(first, first + size, device=self.device)
        key = fold(train.seed, "train", p.stage, p.step, *place)
        needs = stage.method.needs()  # type: ignore[attr-defined]
        source = Draws(fold(key, "data"), index)
        x0, cond = self.data.batch(source) if needs.data else (None, self.data.conditions(source))
        return Batch(Draws(key, index), self.data.shape, x0, cond, self.data.null(cond))

    def _reduce(self, parameters: list[nn.Parameter]) -> None:
        """Average gradients over processes in one flat buffer.

        Explicit rather than DistributedDataParallel: a turn may call one network several times, or leave a
        head unused, and accelerate's accumulation keeps one counter for all roles. Sharded ones are averages already.
        """
        parameters = [p for p in parameters if not is_sharded(p)]
        if self.accelerator.num_processes == 1 or not parameters:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
        flat = self.accelerator.reduce(flat, reduction="mean")  # type: ignore[assignment]
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def _refuse(self, turn: Turn, optimizer: TurnOptimizer) -> None:
        optimizer.refuse()
        self.progress.skipped += 1
        self.meter.add("skipped", 1.0)
        if optimizer.in_a_row >= self.recipe.train.max_skips:
            recent = {k: v for k, v in self.meter.take().items() if k != "seconds"}
            readings = ", ".join(f"{k} {v:.3g}" for k, v in recent.items())
            raise UserError(
                f"stopped at step {self.progress.done}: {optimizer.in_a_row} updates of "
                f"{'+'.join(turn.updates)} in a row had non-finite gradients ({readings}). Lower optim.*.lr or "
                "train.clip, use train.precision=fp32, or raise train.max_skips; the last checkpoint is kept"
            )

    def _record(self) -> None:
        p = self.progress
        means = self._shared({k: [v] for k, v in sorted(self.meter.take().items())})
        readings = {k: v for k, (v,) in means.items()}
        rates = {
            f"lr/{n}": o.rate(s) for o in self.optim.values() for n, s in zip(o.names, o.specs, strict=True)
        }
        self.last_record = {"done": p.done, "stage": p.stage, "skips": p.skipped, **readings, **rates}
        if self.accelerator.is_main_process:
            if self.log:
                self.log.write(self.last_record)
            if self.accelerator.trackers:
                self.accelerator.log(self.last_record, step=p.done)

    def _shared(self, values: dict[str, list[float]]) -> dict[str, list[float]]:
        """The mean over processes of each reading since the last record."""
        if self.accelerator.num_processes == 1 or not values:
            return values
        flat = torch.tensor(
            [v for vs in values.values() for v in vs], dtype=torch.float64, device=self.device
        )
        mean: Any = self.accelerator.reduce(flat, reduction="mean")
        parts = mean.split([len(vs) for vs in values.values()])
        return {k: part.tolist() for k, part in zip(values, parts, strict=True)}

    def modules(self) -> dict[str, nn.Module]:
        """Everything with weights that a checkpoint holds."""
        names = [*trained_roles(self.recipe), *(["state"] if "state" in self.roles else [])]
        out = {name: self.roles[name] for name in names}
        return out | {ema.name: ema.module for ema in self.ema}

    def save(self) -> None:
        """Write a checkpoint on the main process."""
        if self.run is None:
            return
        self.progress.optim = {k: {"updates": o.updates, "skipped": o.skipped} for k, o in self.optim.items()}
        self.progress.ema = {e.name: e.updates for e in self.ema}
        self.progress.meter = self._shared(self.meter.values())
        adams = {k: o.adam for k, o in self.optim.items()}
        if self.accelerator.is_main_process or self.sharded:
            main = self.accelerator.is_main_process if self.sharded else None
            save_checkpoint(
                self.run / "checkpoints", self.modules(), adams, self.progress, self.recipe.train.keep, main
            )
        self.accelerator.wait_for_everyone()

    def resume(self) -> bool:
        """Continue from the newest complete checkpoint; False when there is none."""
        assert self.run is not None
        found = checkpoints(self.run / "checkpoints")
        if not found:
            if self.log and self.accelerator.is_main_process:
                self.log.cut(0)
            return False
        progress, _ = read_state(found[-1])
        stages = self.recipe.stages()
        self._place(progress, stages)
        if progress.stage < len(stages) and progress.step > 0:
            stage = stages[progress.stage]
            self._make_state(stage)
            times = {t.updates: t.times for t in stage.method.turns(self.roles, progress.step)}  # type: ignore[attr-defined]
            for updates, n in times.items():
                if "+".join(updates) in progress.optim:
                    self.optimizer(updates, stage, n)
        wanted = {k: o.adam for k, o in self.optim.items()}
        load_checkpoint(found[-1], self.modules(), wanted)
        self.progress = progress
        self.meter.restore(progress.meter)
        for key, counts in self.progress.optim.items():
            if key in self.optim:
                self.optim[key].updates, self.optim[key].skipped = counts["updates"], counts["skipped"]
        for ema in self.ema:
            ema.updates = self.progress.ema.get(ema.name, 0)
        if self.log and self.accelerator.is_main_process:
            self.log.cut(self.progress.done)
        return True

    def _place(self, progress: Progress, stages: tuple[Stage, ...]) -> None:
        """Where a run continues when train.steps has changed since: a finished one goes on in its last stage."""
        last = len(stages) - 1
        into = progress.done - sum(stage.steps for stage in stages[:last])
        if into > stages[last].steps:
            raise UserError(
                f"{self.run}: has already done {into} steps of the last stage; train.steps must be at least that, "
                f"not {stages[last].steps}"
            )
        if into > 0:
            progress.stage, progress.step = (last, into) if into < stages[last].steps else (last + 1, 0)


def _main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def gradients(parameters: list[nn.Parameter]) -> Tensor:
    """All gradients as one vector, zeros where there is none; for tests and readings."""
    return torch.cat([full(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
