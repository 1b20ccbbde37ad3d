"""MeanFlow (arXiv 2505.13447), from scratch or distilled from a teacher's velocity, and Align Your Flow by switches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.condition import differs, replaced
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import bc
from fewstep.algebra.sampling import Sampler, any_steps
from fewstep.algebra.times import LogitNormal, TimesPart, check_steps
from fewstep.config import part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles
from fewstep.objectives import trajectory as tr
from fewstep.objectives.legs import Teacher


@part("method", "meanflow")
class MeanFlow:
    """The average velocity u(x, t, s) obeys u = v - (t - s) du/dt; the Eulerian limit with gain -1."""

    cites: ClassVar[tuple[str, ...]] = ("2505.13447", "2506.14603")

    source: Literal["data", "teacher"] = "data"
    """Velocity v: eps - x0 of the pair (from scratch), or the teacher's (distillation)."""
    times: TimesPart = LogitNormal(mean=-0.4, std=1.0)
    """Distribution of both times; the larger is t (ImageNet; CIFAR-10: mean -2, std 2)."""
    apart: float = 0.25
    """Share of the batch with s < t; the rest has s = t and is flow matching (ImageNet .25, CIFAR-10 .75)."""
    power: float = 1.0
    """p of the adaptive weight 1 / (e + c)^p (ImageNet 1, CIFAR .75)."""
    c: float = 1e-3
    """c of the adaptive weight, for e a per-sample mean (the paper's 1e-3 is for a sum)."""
    tangent: tr.Tangent = "jvp"
    """How the derivative along the path is taken: jvp forward mode; central differences; semi forward mode in x and a
    difference in the times (rCM)."""
    normalize: float | None = None
    """c of the residual's normalisation R / (|R| + c): Align Your Flow's Eulerian distillation has .1, with
    source: teacher, apart: 1 and power: 0 (arXiv 2506.14603, sec. 3.2)."""
    warmup: int = 0
    """Updates over which du/dt is faded in (FastGen's Wan recipe: 2000)."""
    guidance: float = 1.0
    """Scale omega inside the target: the teacher's, or the student's own with kappa (eq. 19)."""
    kappa: float = 0.0
    """Share of the student's own conditional velocity in the guided target (ImageNet-XL .92 with omega .2)."""
    guided_until: float = 0.75
    """Largest t with the own guided target (paper .75); above it v is the pair's. A teacher is guided at all t."""
    drop_cond: float = 0.0
    """Share of rows trained without their condition (official .1 with guidance)."""
    drop_at: Literal["equal", "any"] = "equal"
    """Which rows: those with s = t alone, at a rate that makes up the share (official), or any."""
    steps: tuple[float, ...] = (1.0,)
    """Levels u that the student is sampled at; other numbers of steps are allowed too."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not 0 <= self.apart <= 1 or not 0 <= self.drop_cond <= 1:
            raise ValueError(f"apart and drop_cond must lie in [0, 1], not {self.apart}, {self.drop_cond}")
        if not 0 <= self.guided_until <= 1:
            raise ValueError(f"guided_until is a time in [0, 1], not {self.guided_until}")

    def needs(self) -> Needs:
        roles = {"student"} | ({"teacher"} if self.source == "teacher" else set())
        jvp, inputs = tr.forward_directions(self.tangent, "xt"), frozenset({"s"} if self.apart else ())
        return Needs(frozenset(roles), data=True, jvp=jvp, process="flow", inputs=inputs)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch, step))

    def pair(self, batch: Batch, process: Any) -> tuple[Tensor, Tensor]:
        """(t, s), s <= t; s = t outside the share `apart`."""
        a, b = (self.times.sample(batch.draws, process) for _ in range(2))
        t, s = torch.maximum(a, b), torch.minimum(a, b)
        return t, torch.where(batch.draws.uniform() < self.apart, s, t)

    def losses(self, roles: Roles, batch: Batch, step: int) -> Iterator[Losses]:
        student, process = roles.student, roles.student.process
        t, s = self.pair(batch, process)
        x0, eps = batch.data(), batch.noise()
        x, _ = add_noise(process, x0, eps, t)
        cond = self.dropped(batch, t, s)
        with torch.no_grad():
            v = self.velocity(roles, batch, cond, x, t, eps - x0)
        here = tr.raw_of(student, "velocity", cond)
        raw = here(x, t, s)
        moved = tr.tangent(here, (x, t, s), (v, torch.ones_like(t), None), self.tangent, floor=s, ceiling=process.t_max)
        fade = min(1.0, step / self.warmup) if self.warmup else 1.0
        residual = tr.eulerian(tr.slopes(process, "velocity", t, s, "t"), x, v, raw.detach(), moved, fade)
        if self.normalize is not None:
            residual = tr.bounded(residual, self.normalize)
        target = tr.toward_raw(raw.detach(), residual, -1.0)
        log = {"tangent_norm": moved.flatten(1).norm(dim=1).mean()}
        yield Losses({"meanflow": tr.adaptive(raw - target, self.power, self.c)}, log)

    def dropped(self, batch: Batch, t: Tensor, s: Tensor) -> Any:
        """The batch's condition with the null one in a share of rows."""
        rate = self.drop_cond * torch.ones_like(t)
        if self.drop_at == "equal" and self.apart < 1:
            rate = torch.where(s == t, (rate / (1 - self.apart)).clamp_max(1), 0 * rate)
        if self.drop_cond == 0 or batch.cond is None or batch.null_cond is None:
            return batch.cond
        return replaced(batch.cond, batch.draws.uniform() < rate, batch.null_cond)

    def velocity(self, roles: Roles, batch: Batch, cond: Any, x: Tensor, t: Tensor, pair: Tensor) -> Tensor:
        """The instantaneous velocity that the target follows, guided."""
        if self.source == "teacher":
            seen = replace(batch, cond=cond)
            return Teacher(roles.teacher, seen, self.guidance)(x, t).velocity()
        if (self.guidance, self.kappa) == (1.0, 0.0) or cond is None or batch.null_cond is None:
            return pair
        empty = roles.student(x, t, batch.null_cond).velocity()
        own = roles.student(x, t, cond).velocity()
        guided = self.guidance * pair + (1 - self.guidance - self.kappa) * empty + self.kappa * own
        # Rows without a condition learn the plain field, which the guided one is built from.
        kept = (t <= self.guided_until) & differs(cond, batch.null_cond)
        return torch.where(bc(kept.to(t.dtype), x) > 0, guided, pair)

    def sampler(self) -> Sampler:
        return Sampler(kind="map", steps=self.steps, counts=any_steps(self.steps))
