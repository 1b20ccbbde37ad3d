"""Factorised diffusion distillation: several teachers, each of one ability, teach one student (EVE, arXiv 2403.09334)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.guidance import guided
from fewstep.algebra.rollout import unrolled
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import TimesPart, Uniform, check_steps
from fewstep.algebra.views import View, ViewPart, Whole
from fewstep.config import config, part
from fewstep.methods.critic import Critic
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.terms import noised
from fewstep.networks.roles import Roles
from fewstep.objectives.score import ScoreWeight


@config
class Expert:
    """One teacher: what it sees of a sample, and how strongly and by which difference it pulls."""

    role: str = "teacher"
    """Its role, such as an adapter that has one ability."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor on its term (EVE: .5 for each of two)."""
    view: ViewPart = Whole()
    """What it sees: EVE's editing teacher one random frame, its video teacher all."""
    kind: Literal["sds", "vsd"] = "sds"
    """sds: the teacher's answer against the drawn noise (EVE), which draws all samples to one point; vsd: against that of
    a critic, which keeps a distribution."""
    critic: str = "critic"
    """Role of kind vsd that tracks what this view shows."""
    guidance: float = 1.0
    """Guidance scale of the teacher; 1 is none."""


@part("method", "factorised")
class Factorised:
    """Every teacher's score difference at its own view of one sample, their sum through all of the student's steps."""

    cites: ClassVar[tuple[str, ...]] = ("2403.09334",)

    experts: tuple[Expert, ...] = (Expert(),)
    """The teachers."""
    steps: tuple[float, ...] = (1.0, 0.667, 0.333)
    """Levels u at which the student is sampled, by its own jumps (EVE: three)."""
    bins: bool = True
    """Train at a level drawn anew in each bin, which ends at the next one (EVE's K-bin); the first stays the prior."""
    times: TimesPart = Uniform(low=0.02, high=0.98)
    """Re-noising level of the score differences."""
    weight: ScoreWeight = "eps"
    """Weight of the x0 difference; eps makes it one of the noise, EVE's with c(t) = 1."""
    critic: Critic = Critic()
    """How the critics of kind vsd train."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not self.experts:
            raise ValueError("experts is empty; name at least one, such as [{role: teacher}]")
        for key in ("alignment", "reset_every"):
            if getattr(self.critic, key):
                raise ValueError(
                    f"critic.{key}: the critics follow what a view shows of the samples, not the student; give 0"
                )
        views: dict[str, View] = {}
        for e in self._tracked():
            if views.setdefault(e.critic, e.view) != e.view:
                raise ValueError(f"experts: the critic {e.critic!r} would track two views; give each its own")

    def _tracked(self) -> list[Expert]:
        return [e for e in self.experts if e.kind == "vsd"]

    def needs(self) -> Needs:
        teachers, critics = {e.role for e in self.experts}, {e.critic for e in self._tracked()}
        return Needs(frozenset({"student"} | teachers | critics), frozen=frozenset({"teacher"} | teachers))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch))
        for e in {e.critic: e for e in self._tracked()}.values():
            yield Turn((e.critic,), partial(self.critic_losses, roles, expert=e), times=self.critic.steps)

    def draw(self, roles: Roles, batch: Batch) -> Tensor:
        """Samples (b, *d) with the gradient of every step."""
        return unrolled(roles.student, batch.draws, batch.shape, self.steps, batch.cond, bins=self.bins)

    def student_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = self.draw(roles, batch)
        losses = Losses(log={"spread": x.detach().std(0).mean()} if len(x) > 1 else {})
        for i, e in enumerate(self.experts):
            seen = e.view.see(x, batch.draws)
            pull = self.pull(roles, replace(batch, shape=tuple(seen.shape[1:])), seen.detach(), e)
            losses[f"{e.kind}_{i}_{e.role}"] = e.weight * obj.surrogate_loss(seen, pull)
        yield losses

    @torch.no_grad()
    def pull(self, roles: Roles, batch: Batch, seen: Tensor, expert: Expert) -> Tensor:
        """The weighted score difference (b, *e) of one expert at what it sees."""
        process: Any = roles.student.process
        x_tau, tau = noised(self.times, roles, batch, seen)
        real = guided(roles[expert.role], x_tau, tau, batch.cond, batch.null_cond, expert.guidance)
        fake = seen if expert.kind == "sds" else roles[expert.critic](x_tau, tau, batch.cond).x0
        return obj.score_weight(self.weight, process, tau, seen, real.x0) * (fake - real.x0)

    def critic_losses(self, roles: Roles, batch: Batch, expert: Expert) -> Iterator[Losses]:
        with torch.no_grad():
            seen = expert.view.see(self.draw(roles, batch), batch.draws)
        tracking = Roles(student=roles.student, critic=roles[expert.critic])
        yield self.critic.losses(tracking, replace(batch, shape=tuple(seen.shape[1:])), seen)

    def sampler(self) -> Sampler:
        return Sampler(kind="map", steps=self.steps)
