"""The training loop: any roles, any turns, one page. It knows no method by name, and neither files nor signals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from fewstep.algebra.batch import Batch
from fewstep.algebra.condition import rows as cond_rows
from fewstep.config import UserError
from fewstep.methods.method import Turn
from fewstep.methods.turns import updates_a_step
from fewstep.networks.adapters import load_own_state, own_state
from fewstep.networks.blocks import fill, intervals_of
from fewstep.networks.roles import Roles
from fewstep.objectives.trajectory import probe
from fewstep.recipe.schema import Stage
from fewstep.train.log import Meter
from fewstep.train.optim import TurnOptimizer
from fewstep.train.parallel import clip_grad_norm
from fewstep.train.session import Session
from fewstep.train.state import Progress


class Refused(UserError):
    """Too many updates in a row had non-finite gradients."""


class Loop:
    """Optimiser steps of a session's roles, one step of a stage at a time.

    Args:
        session: data, roles and devices.
        on_state: called with the roles whenever a stage's own buffers were made anew (a bank of pairs, say).
    """

    def __init__(self, session: Session, on_state: Callable[[Roles], None] | None = None) -> None:
        self.session, self.on_state = session, on_state
        self.progress, self.meter = Progress(), Meter()
        self.optim: dict[str, TurnOptimizer] = {}
        self.factors: Mapping[str, float] = {}
        """On the learning rates of roles, which the guard lowers; for optimisers that are made from now on."""
        self.touched = False
        """Whether the step that is being done has changed anything that a checkpoint holds."""

    def begin(self, stage: Stage) -> None:
        """Fresh optimisers, the method's own state, and the weights that the stage says to copy."""
        self.make_state(stage)
        self.optim.clear()
        self.progress.optim = {}
        roles = self.session.roles
        for target, source in stage.copy.items():
            try:
                if intervals_of(roles[target]) and not intervals_of(roles[source]):
                    fill(roles[target], roles[source])
                else:
                    load_own_state(roles[target], own_state(roles[source]))
            except RuntimeError:
                raise UserError(
                    f"copy: {target} and {source} are different networks; their weights cannot be copied"
                ) from None
        along = stage.method.needs().jvp
        if along:
            self._probe_tangent(stage, along)
        for ema in self.session.ema:
            ema.reset(roles.student)

    def make_state(self, stage: Stage) -> None:
        """The method's own buffers, fresh."""
        self.session.make_state(stage)
        if self.on_state:
            self.on_state(self.session.roles)

    def _probe_tangent(self, stage: Stage, along: str) -> None:
        """Refuse to train on a forward-mode derivative that finite differences do not confirm."""
        batch = self.batch(stage, (0, 0), 0)
        student = self.session.roles.student
        process, rows = student.process, min(len(batch), 8)
        u = torch.linspace(0.3, 0.8, rows, dtype=torch.float64, device=self.session.device)
        t = process.grid(u)
        cond = cond_rows(batch.cond, slice(rows))
        probe(student, batch.noise()[:rows], t, process.grid(u / 2), cond, along=along)

    def batch(self, stage: Stage, place: tuple[int, int], micro: int) -> Batch:
        """The micro-batch of a (turn, repeat) of the step that is next."""
        return self.session.batch(stage, (self.progress.stage, self.progress.step, *place), micro)

    def optimizer(self, turn: Turn, stage: Stage) -> TurnOptimizer:
        """The one optimiser of a turn's set of roles; a role in two sets is refused.

        A method may have several turns of one set in a step (pso, sfd), which all count.
        """
        updates = turn.updates
        key = "+".join(updates)
        if key not in self.optim:
            for other in self.optim.values():
                shared = set(other.names) & set(updates)
                if shared:
                    raise ValueError(
                        f"{shared.pop()} would be stepped by two optimisers, {other.names} and {updates}; let its turns "
                        "update the same roles"
                    )
            specs = {name: self.session.recipe.optimizer(name, stage) for name in updates}
            for name in set(updates) & set(self.factors):
                specs[name] = replace(specs[name], lr=specs[name].lr * self.factors[name])
            times = max(turn.times, updates_a_step(stage.method, stage.steps).get(updates, 0))
            life = min(turn.life or stage.steps, stage.steps)
            self.optim[key] = TurnOptimizer(self.session.roles, updates, specs, life * times)
        return self.optim[key]

    def step(self, stage: Stage) -> None:
        """All turns of one step."""
        session, student_moved = self.session, False
        self.touched = "state" in session.roles  # a method may write there at any moment
        for number, turn in enumerate(stage.method.turns(session.roles, self.progress.step)):
            session.roles.train_only(*turn.updates)
            if turn.life and self.progress.step and self.progress.step % turn.life == 0:
                self.optim.pop("+".join(turn.updates), None)
            optimizer = self.optimizer(turn, stage)
            if session.offload:
                session.offload.begin(turn.updates, self.optim)
            for repeat in range(turn.times):
                moved = self.update(turn, optimizer, stage, (number, repeat))
                student_moved |= moved and "student" in turn.updates
        if student_moved:
            for ema in session.ema:
                ema.update(session.roles.student)

    def update(self, turn: Turn, optimizer: TurnOptimizer, stage: Stage, place: tuple[int, int]) -> bool:
        """One optimiser step over all micro-batches; False when it was refused as non-finite."""
        session, train = self.session, self.session.recipe.train
        for micro in range(train.accumulate):
            batch = turn.batch(micro) or self.batch(stage, place, micro)
            with session.accelerator.autocast():
                for losses in turn.losses(batch):
                    (losses.total() / train.accumulate).backward()
                    for name, value in {**losses, **losses.log}.items():
                        self.meter.add(name, value)
        session.average_gradients(optimizer.parameters)
        norm = clip_grad_norm(optimizer.parameters, train.clip)
        finite = bool(torch.isfinite(norm))
        self.touched = True
        if finite:
            self.meter.add(f"grad_norm/{'+'.join(turn.updates)}", norm)
            optimizer.step()
        else:
            self._refuse(turn, optimizer, stage)
        optimizer.zero()
        return finite

    def _refuse(self, turn: Turn, optimizer: TurnOptimizer, stage: Stage) -> None:
        optimizer.refuse()
        self.progress.skipped += 1
        self.meter.add("skipped", 1.0)
        if optimizer.in_a_row >= self.session.recipe.train.max_skips:
            recent = {k: v for k, v in self.meter.take().items() if k != "seconds"}
            readings = ", ".join(f"{k} {v:.3g}" for k, v in recent.items())
            own = " or the stage's own rates" * bool(stage.rates)
            raise Refused(
                f"stopped at step {self.progress.done}: {optimizer.in_a_row} updates of "
                f"{'+'.join(turn.updates)} in a row had non-finite gradients ({readings}). Lower optim.*.lr{own} or "
                "train.clip, use train.precision=fp32, or raise train.max_skips, and go on from its last "
                "sound checkpoint with `--from RUN` and another --out"
            )
