"""MeanFlow (arXiv 2505.13447), from scratch or from a teacher's velocity; Align Your Flow and iMF by switches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.condition import replaced
from fewstep.algebra.noising import add_noise
from fewstep.algebra.sampling import Sampler, any_steps
from fewstep.algebra.times import LogitNormal, TimesPart, check_steps
from fewstep.config import part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.own_guidance import own_guided
from fewstep.networks.roles import Roles
from fewstep.objectives import trajectory as tr
from fewstep.objectives.legs import Scale, Teacher, check_scale, drawn, middle


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
    to_clean: float = 0.0
    """Share of the batch, out of `apart`, whose s is 0 (AnyFlow, arXiv 2605.13724: .25 out of .5)."""
    along: Literal["target", "own"] = "target"
    """The velocity that du/dt is taken along: target, the one that is followed, or own, the student's at s = t, which
    needs no pair: iMF's V = u + (t - s) du/dt regresses that target (arXiv 2512.02012)."""
    power: float = 1.0
    """p of the adaptive weight 1 / (e + c)^p (ImageNet 1, CIFAR .75)."""
    c: float = 1e-3
    """c of the adaptive weight, for e a per-sample mean: a published c of a sum (paper 1e-3, code 1e-2) over d."""
    tangent: tr.Tangent = "jvp"
    """How the derivative along the path is taken: jvp forward mode; central differences; semi forward mode in x and a
    difference in the times (rCM)."""
    normalize: float | None = None
    """c of the residual's normalisation R / (|R| + c): Align Your Flow's Eulerian distillation has .1, with
    source: teacher, apart: 1 and power: 0 (arXiv 2506.14603, sec. 3.2)."""
    warmup: int = 0
    """Updates over which du/dt is faded in (FastGen's Wan recipe: 2000)."""
    guidance: Scale = 1.0
    """Scale inside the target: the teacher's, or omega of the student's own with kappa (eq. 19)."""
    embed_guidance: bool = False
    """True: the student takes the scale w as an input. Without a teacher the target is then the pair's velocity plus
    (1 - 1/w)(own at w - own without condition), eq. 19 at omega 1 and kappa 1 - 1/w (iMF)."""
    sample_guidance: float | None = None
    """Scale that a student with it as an input is sampled at; null: the middle of guidance."""
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
        check_scale(self.guidance)
        if self.along == "own":
            object.__setattr__(self, "cites", (*type(self).cites, "2512.02012"))
        for name in ("apart", "drop_cond", "guided_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must lie in [0, 1], not {getattr(self, name)}")
        if not 0 <= self.to_clean <= self.apart:
            raise ValueError(f"to_clean: must lie in [0, apart], [0, {self.apart}], not {self.to_clean}")
        if self.along == "own" and self.apart == 1:
            raise ValueError("apart: 1 leaves no row to train the velocity at s = t, which along: own needs; give less")
        if self.embed_guidance and self.kappa:
            raise ValueError(f"kappa: {self.kappa} has no effect with embed_guidance, where it is 1 - 1/w; leave it out")
        if self.sample_guidance is not None and not self.embed_guidance:
            raise ValueError("sample_guidance: is for a student that takes the scale; set embed_guidance: true")
        if self.source == "data" and not self.embed_guidance and not isinstance(self.guidance, int | float):
            raise ValueError("guidance: several scales of a student's own need embed_guidance: true, or give one number")

    def needs(self) -> Needs:
        roles = {"student"} | ({"teacher"} if self.source == "teacher" else set())
        inputs = frozenset(({"s"} if self.apart else set()) | ({"w"} if self.embed_guidance else set()))
        jvp = tr.forward_directions(self.tangent, "xt")
        return Needs(frozenset(roles), data=True, jvp=jvp, process="flow", inputs=inputs)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch, step))

    def pair(self, batch: Batch, process: Any) -> tuple[Tensor, Tensor]:
        """(t, s), s <= t; s = t outside the share `apart`, 0 in the share `to_clean`."""
        a, b = (self.times.sample(batch.draws, process) for _ in range(2))
        t, s = torch.maximum(a, b), torch.minimum(a, b)
        u = batch.draws.uniform()
        return t, torch.where(u < self.apart, torch.where(u < self.to_clean, 0 * s, s), t)

    def losses(self, roles: Roles, batch: Batch, step: int) -> Iterator[Losses]:
        student, process = roles.student, roles.student.process
        (t, s), x0, eps = self.pair(batch, process), batch.data(), batch.noise()
        x, _ = add_noise(process, x0, eps, t)
        cond = self.dropped(batch, t, s)
        scale = drawn(self.guidance, batch.draws)
        call = {"w": 0 * t + scale} if self.embed_guidance else {}
        here = tr.raw_of(student, "velocity", cond, **call)
        with torch.no_grad():
            v = self.velocity(roles, batch, cond, x, t, eps - x0, scale, call.get("w"))
            along = v if self.along == "target" else here(x, t, t)
        raw = here(x, t, s)
        way = (along, torch.ones_like(t), None)
        moved = tr.tangent(here, (x, t, s), way, self.tangent, floor=s, ceiling=process.t_max)
        fade = min(1.0, step / self.warmup) if self.warmup else 1.0
        residual = tr.eulerian(tr.slopes(process, "velocity", t, s, "t"), x, v, raw.detach(), moved, fade)
        if self.normalize is not None:
            residual = tr.bounded(residual, self.normalize)
        target = tr.toward_raw(raw.detach(), residual, -1.0)
        norm = moved.flatten(1).norm(dim=1).mean()
        yield Losses({"meanflow": tr.adaptive(raw - target, self.power, self.c)}, {"tangent_norm": norm})

    def dropped(self, batch: Batch, t: Tensor, s: Tensor) -> Any:
        """The batch's condition with the null one in a share of rows."""
        rate = self.drop_cond * torch.ones_like(t)
        if self.drop_at == "equal" and self.apart < 1:
            rate = torch.where(s == t, (rate / (1 - self.apart)).clamp_max(1), 0 * rate)
        if self.drop_cond == 0 or batch.cond is None or batch.null_cond is None:
            return batch.cond
        return replaced(batch.cond, batch.draws.uniform() < rate, batch.null_cond)

    def velocity(
        self, roles: Roles, batch: Batch, cond: Any, x: Tensor, t: Tensor, pair: Tensor, scale: Any, w: Tensor | None
    ) -> Tensor:
        """The instantaneous velocity that the target follows, guided."""
        if self.source == "teacher":
            return Teacher(roles.teacher, replace(batch, cond=cond), scale)(x, t).velocity()
        law: dict[str, Any] = {"w": w} if self.embed_guidance else {"omega": scale, "kappa": self.kappa}
        return own_guided(roles.student, batch, cond, x, t, pair, until=self.guided_until, **law)

    def sampler(self) -> Sampler:
        scale = middle(self.guidance) if self.sample_guidance is None else self.sample_guidance
        given = scale if self.embed_guidance else None
        return Sampler(kind="map", steps=self.steps, counts=any_steps(self.steps), guidance=given)
