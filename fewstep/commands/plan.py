"""How much memory a recipe will take, before it is launched: a step traced without computing it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_map_only

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws
from fewstep.commands.plan_configs import Sizes, bare_session
from fewstep.commands.plan_passes import Passes
from fewstep.commands.plan_rows import RoleMemory, buffers_of, moments
from fewstep.config import UserError
from fewstep.networks.adapters import Adapted, enable_checkpointing, own_parameters, recomputing
from fewstep.networks.roles import Roles
from fewstep.recipe.schema import Recipe, Stage
from fewstep.recipe.store import load
from fewstep.train.live import Live, allocated, bytes_of, fake_mode, make_fake
from fewstep.train.product import product_of
from fewstep.train.session import Session
from fewstep.train.trainer import Trainer

MIB = 2**20
TINY = (1, 2, 4)
"""Micro-batches that are traced with real tensors."""


ROW = 3
"""Turns in a row of the same roles that are traced; the first may share a rollout, ten critic updates are alike.

From configs it is one: what a rollout shares are a few latents."""


@dataclass
class Turns:
    """What the turns of a stage need beyond what stays: peak bytes, gradients included, and the roles they call."""

    peak: dict[tuple[str, ...], int] = field(default_factory=dict)
    called: dict[tuple[str, ...], set[str]] = field(default_factory=dict)
    courses: list[tuple[tuple[str, ...], list[int]]] = field(default_factory=list)
    """Of every turn: the roles it trains, and the bytes after each of its operations."""
    note: str = ""
    """How it was done where not as one trace of fake tensors, and why."""

    def add(self, updates: tuple[str, ...], course: list[int]) -> None:
        self.courses.append((updates, course))
        self.peak[updates] = max(self.peak.get(updates, 0), *course)


@dataclass(frozen=True)
class Plan:
    """The estimate of one process.

    activations: by trained roles, beside the gradients. total: at the worst moment. ways: (setting, total with
    it), the smallest first. note: how totals were come by where not by one trace, a line each. configs: what a plan from
    configs alone is of.
    """

    roles: dict[str, RoleMemory]
    activations: dict[tuple[str, ...], int]
    total: int
    micro_batch: int
    ways: tuple[tuple[str, int], ...] = ()
    note: str = ""
    configs: str = ""
    export: str = ""
    """That the product will not export to a stock pipeline and why, "" for one that will."""


def plan(recipe: Recipe, processes: int = 1, *, ways: bool = True, sizes: Sizes | None = None) -> Plan:
    """Estimate the peak of tensors alive in training, in bytes, for one of `processes` processes.

    sizes: plan from configs alone, with these in place of what only weights, latents and texts would tell.

    Weights, gradients, moments and averages are counted; activations and temporaries come from tracing every turn
    at the recipe's own micro-batch with fake tensors. Workspaces of libraries and the allocator's fragments come on
    top. Raises UserError when the batch does not divide.
    """
    train = recipe.train
    if train.batch % (processes * train.accumulate):
        raise UserError(
            f"train.batch {train.batch} must be divisible by processes x train.accumulate = {processes} x "
            f"{train.accumulate}"
        )
    tracer = _Tracer(recipe, processes, sizes)
    first = tracer.total(recipe)
    found, notes = [], [first.note]
    for setting, other in _alternatives(recipe, processes) if ways else ():
        if sizes is not None and setting.startswith(("train.precision", "train.accumulate")):
            continue  # each is a trace of its own, which takes long at a real size
        try:
            less = tracer.total(other)
        except UserError as error:
            notes.append(f"{setting}: not planned, {str(error).removeprefix('plan: ')}")
            continue
        if less.total < 0.98 * first.total:
            found.append((setting, less.total))
            notes += [f"{setting}: {less.note}"] if less.note != first.note else []
    note = "\n".join(filter(None, notes))
    return replace(first, ways=tuple(sorted(found, key=lambda w: w[1])), note=note, export=tracer.export)


def measured(recipe: Recipe, *, cpu: bool = False) -> int:
    """Bytes of tensors at the worst moment of a real step, the second of each stage, in this process.

    A GPU's allocator says it itself; on a CPU torch's profiler does, and what stays between steps is counted.
    """
    trainer, worst = Trainer(recipe, cpu=cpu), 0
    for number, stage in enumerate(recipe.stages()):
        trainer.progress.stage = number
        trainer.loop.begin(stage)
        trainer.loop.step(stage)
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            trainer.loop.step(stage)
            worst = max(worst, torch.cuda.max_memory_allocated())
            continue
        modules = [*trainer.roles.values(), *(e.module for e in trainer.session.ema)]
        stay = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        stay += [v for o in trainer.loop.optim.values() for s in o.adam.state.values() for v in s.values() if v.ndim]
        worst = max(worst, bytes_of(stay) + allocated(lambda stage=stage: trainer.loop.step(stage)))
    return worst


def _alternatives(recipe: Recipe, processes: int) -> Iterator[tuple[str, Recipe]]:
    train = recipe.train

    def changed(**settings: Any) -> Recipe:
        return replace(recipe, train=replace(train, **settings))

    if not train.checkpointing:
        yield "train.checkpointing=true", changed(checkpointing=True)
    if train.precision == "fp32":
        yield "train.precision=bf16", changed(precision="bf16")
    share = train.batch // processes
    more = next((n for n in range(2 * train.accumulate, share + 1) if share % n == 0), None)
    if more:
        yield f"train.accumulate={more}", changed(accumulate=more)
    if not train.offload:
        yield "train.offload=true", changed(offload=True)
    if any(o.bits == 32 for o in recipe.optim.values()):
        small = {k: replace(o, bits=8) for k, o in recipe.optim.items()}
        yield "optim.*.bits=8", replace(recipe, optim=small)
    if len(train.ema) > 1:
        yield f"train.ema=[{train.ema[0]}]", changed(ema=train.ema[:1])
    if train.parallel == "ddp" and processes > 1:
        yield "train.parallel=fsdp", changed(parallel="fsdp")


def _plain(recipe: Recipe) -> Recipe:
    """With its switches off, for one process; what they change is traced or counted."""
    off: dict[str, Any] = {
        "offload": False,
        "compile": (),
        "checkpointing": False,
        "precision": "fp32",
        "trackers": (),
    }
    train = replace(recipe.train, batch=1, accumulate=1, parallel="ddp", attention="auto", **off)
    return replace(recipe, train=train)


def _no_filling(*_: Any) -> None:
    """In place of what fills a method's state at its start (pairs, moments): hours, and no more memory than a step."""


class _Tracer:
    """Builds the roles once, makes them fake, and traces a recipe's turns on them."""

    def __init__(self, recipe: Recipe, processes: int, sizes: Sizes | None = None) -> None:
        from fewstep.export.forecast import warning

        self.processes, self.bare, self.export, self.configs = processes, sizes is not None, "", ""
        self.mode = fake_mode()
        self._known: dict[tuple[Any, ...], Turns] = {}
        self.passes = Passes()
        if sizes is not None:
            bare = _plain(replace(recipe, train=replace(recipe.train, ema=())))
            bare_one = bare_session(bare, sizes, self.mode)
            session, self.configs = bare_one, bare_one.told
        else:
            session = Session(_plain(recipe), cpu=True)
            self.export = warning(partial(product_of, recipe, session.product, session.data, "student"))
        self.session, self.roles = session, dict(session.roles)
        averages = [bytes_of(own_parameters(e.module)) for e in session.ema]
        student = bytes_of(own_parameters(self.roles["student"]))
        self.ema = student if sizes is not None else sum(averages) // max(len(averages), 1)
        session.ema = []
        self.reason = ""
        try:
            if sizes is None:
                make_fake(self.roles.values(), self.mode)
            self.fake = True
        except Exception as error:
            self.fake, self.reason = False, _failed(error)

    def total(self, recipe: Recipe) -> Plan:
        train, n = recipe.train, self.processes
        micro = train.batch // n // train.accumulate
        trained = set().union(*(s.method.needs().trained for s in recipe.stages()))
        shards = n if train.parallel == "fsdp" else 1
        roles: dict[str, RoleMemory] = {}
        for name, module in self.roles.items():
            own = own_parameters(module)
            size, part = bytes_of(own), shards if _sharded(module) else 1
            row = RoleMemory(weights=(size + buffers_of(module)) // part)
            if name in trained:
                row.gradients = size // part
                row.optimizer = moments(own, recipe.optimizer(name)) // part
            if name == "student":
                row.ema = len(train.ema) * self.ema // part
            roles[name] = row
        totals: list[int] = [0]
        notes: list[str] = []
        activations: dict[tuple[str, ...], int] = {}
        for number, stage in enumerate(recipe.stages()):
            # Neither offloading nor moments nor averages change what a turn needs beside them.
            key = (number, micro, train.precision, train.checkpointing)
            turns = self._known[key] = self._known.get(key) or self.trace(stage, recipe, micro)
            notes.append(turns.note)
            for updates, peak in turns.peak.items():
                full = sum(bytes_of(own_parameters(self.roles[r])) for r in updates)
                kept = sum(roles[r].gradients for r in updates)
                beside = max(0, peak - full)
                activations[updates] = max(activations.get(updates, 0), beside)
                # Gradients are averaged through one flat copy, when the activations are gone.
                reduce = 2 * kept if n > 1 and train.parallel == "ddp" else 0
                stays = self._stays(roles, updates, turns.called[updates], train.offload)
                totals.append(stays + kept + max(beside, reduce))
        note = "\n".join(dict.fromkeys(filter(None, notes)))
        return Plan(roles, activations, max(totals), micro, note=note, configs=self.configs)

    def _stays(self, roles: dict[str, RoleMemory], updates: tuple[str, ...], called: set[str], offload: bool) -> int:
        if not offload:
            return sum(r.weights + r.optimizer + r.ema for r in roles.values())
        here = called | set(updates)
        kept = sum(r.weights for name, r in roles.items() if name in here)
        return kept + sum(r.ema for r in roles.values()) + sum(roles[u].optimizer for u in updates)

    def trace(self, stage: Stage, recipe: Recipe, micro: int) -> Turns:
        """Peaks of the turns of a stage at a micro-batch; of tiny ones, extrapolated, where fakes do not do."""
        bf16, saved = recipe.train.precision == "bf16", recipe.train.checkpointing
        if self.fake:
            try:
                with self._saving(saved), self.passes.of(self.roles.values()):
                    return self._trace(stage, micro, bf16, self.mode)
            except Exception as error:
                self.reason = _failed(error)
                if self.bare:
                    raise UserError(
                        f"plan: from configs alone method {stage.method.name} cannot be traced, {self.reason}; leave "
                        "--weights out"
                    ) from error
                self.fake = False
                self._rebuild(recipe)
        with self._saving(saved):
            if micro > max(TINY):
                try:
                    tiny = [self._trace(stage, b, bf16, nullcontext()) for b in TINY]
                    said = f"extrapolated from {TINY[0]}, {TINY[1]} and {TINY[2]} samples; {self.reason}"
                    return replace(_extrapolated(tiny, micro), note=said)
                except (UserError, ValueError, RuntimeError):
                    pass  # a method of groups, or one that does other things at another batch
            found = self._trace(stage, micro, bf16, nullcontext())
        return replace(found, note=f"traced by computing a step; {self.reason}")

    def _saving(self, wanted: bool) -> AbstractContextManager[None]:
        """The roles that train with checkpointing or without."""
        return _checkpointed([m for n, m in self.roles.items() if n != "teacher"], wanted)

    def _rebuild(self, recipe: Recipe) -> None:
        self.session = Session(_plain(replace(recipe, train=replace(recipe.train, ema=()))), cpu=True)
        self.roles = dict(self.session.roles)

    def _trace(self, stage: Stage, micro: int, bf16: bool, mode: Any) -> Turns:
        session, turns = self.session, Turns()
        session.roles = Roles(**self.roles)
        session.make_state(stage)
        roles = session.roles
        for part in roles.state.modules() if "state" in roles else ():
            if hasattr(part, "fill"):
                part.fill = _no_filling
        cast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        known = [t for m in roles.values() for t in (*m.parameters(), *m.buffers())]
        known += [t for m in roles.values() if isinstance(m, Adapted) for t in m.base.parameters()]
        session.recipe = replace(session.recipe, train=replace(session.recipe.train, batch=micro))
        row = 0
        last: tuple[str, ...] = ()
        for number, turn in enumerate(stage.method.turns(roles, 0)):
            row, last = (row + 1 if turn.updates == last else 1), turn.updates
            if row > (1 if self.bare else ROW):
                continue
            roles.train_only(*turn.updates)
            called: set[str] = set()
            hooks = [m.register_forward_pre_hook(_noting(called, n, roles)) for n, m in roles.items()]
            live = Live(known)
            self.passes.turn(live)
            try:
                with mode, live, cast:
                    batch = turn.batch(0)
                if batch is None:
                    # Real rows: a data set reads them from files by number, and fakes have none.
                    batch = session.batch(stage, (0, 0, number, 0), 0)
                    with mode, live:
                        batch = _copied(batch)
                with mode, live, cast:
                    for losses in turn.losses(batch):
                        losses.total().backward()
            finally:
                self.passes.turn(None)
                for hook in hooks:
                    hook.remove()
                for t in known:
                    t.grad = None
            turns.add(turn.updates, [*live.course, live.peak])
            turns.called.setdefault(turn.updates, set()).update(called)
        return turns


def _failed(error: Exception) -> str:
    """Why a trace of fake tensors failed, in a few words."""
    line = (str(error).splitlines() or [""])[0][:100]
    looks = isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
    return f"the trace failed with {type(error).__name__}: {line}" + (" (it looks at values)" if looks else "")


def _copied(batch: Batch) -> Batch:
    """The batch with tensors of its own, made and counted by the modes that are entered.

    Its numbers too: those of a fake index are drawn by torch, of a real one by numpy, which looks at values.
    """
    x0, cond, null = (tree_map_only(Tensor, Tensor.clone, v) for v in (batch.x0, batch.cond, batch.null_cond))
    draws = Draws(batch.draws.key, batch.draws.index.clone())
    return replace(batch, draws=draws, x0=x0, cond=cond, null_cond=null)


def _extrapolated(tiny: Sequence[Turns], micro: int) -> Turns:
    """Turns at a micro-batch from those at TINY: bytes after each operation are a polynomial of the batch.

    Their largest is not, for at a small batch it is that of the gradients and at a large one of the activations.
    Raises ValueError when the turns have different operations.
    """
    out = Turns(called=tiny[0].called)
    for same in zip(*(t.courses for t in tiny), strict=True):
        if len({len(course) for _, course in same}) > 1:
            raise ValueError("turns of different operations")
        weights = [math.prod((micro - other) / (b - other) for other in TINY if other != b) for b in TINY]
        courses = torch.tensor([course for _, course in same], dtype=torch.float64)
        out.add(same[0][0], (torch.tensor(weights, dtype=torch.float64) @ courses).long().tolist())
    return out


def _noting(called: set[str], name: str, roles: Roles) -> Any:
    base = next((n for n, m in roles.items() if isinstance(roles[name], Adapted) and m is roles[name].base), name)
    return lambda _module, _args: called.update((name, base))


@contextmanager
def _checkpointed(modules: Sequence[nn.Module], wanted: bool) -> Iterator[None]:
    if wanted:
        for m in modules:
            enable_checkpointing(m)
    try:
        yield
    finally:
        for m in modules if wanted else ():
            for inner, _ in recomputing(m):
                inner.disable_gradient_checkpointing()


def _sharded(module: nn.Module) -> bool:
    return hasattr(module, "process") and not isinstance(module, Adapted)


if __name__ == "__main__":
    print(measured(load(sys.argv[1], sys.argv[2:])))
