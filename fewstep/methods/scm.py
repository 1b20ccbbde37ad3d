"""sCM: Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models (arXiv 2410.11081), and TBCM's source."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import Trig, bc
from fewstep.algebra.sampling import Sampler, any_steps
from fewstep.algebra.times import TimesPart, TrigLogNormal, check_steps, shift
from fewstep.config import Count, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.denoiser import Rescheduled
from fewstep.networks.roles import Roles
from fewstep.objectives import per_sample, trajectory as tr
from fewstep.objectives.legs import Scale, Teacher, check_scale, drawn, middle


@part("method", "scm")
class SCM:
    """The Eulerian limit at s = 0 in TrigFlow, whatever process the student speaks; it is rescheduled here."""

    cites: ClassVar[tuple[str, ...]] = ("2410.11081",)

    source: Literal["teacher", "data", "trajectory"] = "teacher"
    """teacher: sCD, velocity of the teacher at noised data; data: sCT, velocity of the pair (x0, eps);
    trajectory: points on the teacher's own path from noise, without data (TBCM, arXiv 2511.20410)."""
    times: TimesPart = TrigLogNormal(sigma_data=1.0)
    """TrigFlow times; the paper's e^N(-1, 1.4^2) / sigma_data, with data scaled to 1 here."""
    points: Count = 15
    """TBCM: points taken from each teacher trajectory, one per interval of its route (official 15)."""
    shift: float = 2.5
    """TBCM: flow shift of the route (official 2.5)."""
    guidance: Scale = 1.0
    """The teacher's scale (SANA-Sprint: one of 4, 4.5, 5)."""
    embed_guidance: bool = False
    """True: the student takes the scale as its input w (SANA-Sprint)."""
    tangent: tr.Tangent = "jvp"
    """How the derivative along the path is taken: jvp forward mode; central differences; semi forward mode in x and a
    difference in the times (rCM)."""
    warmup: PositiveInt = 10_000
    """Updates over which the unstable part of the tangent is faded in (sec. 4.1)."""
    fade: Literal["scm", "rcm"] = "scm"
    """How, with r from 0 to 1. scm: r times all but the velocity error; rcm: dF/dt as it is from the start, r before
    x_t alone, and sqrt(1 - r^2 sin^2 t) in place of a cos t before the error (rCM, arXiv 2510.08431)."""
    normalize: Literal["rms", "l2"] = "l2"
    """Norm of the tangent normalisation g / (|g| + c)."""
    c: float = 0.1
    """Its constant. Below |g| it makes every g a direction: right in many dimensions, where all |g| are alike; in two
    a c near |g| keeps the mean of a noisy g (sCT) where it was."""
    weighting: Literal["learned", "one"] = "learned"
    """learned: e^-l error + l with the role `weighting` (a logvar network), the paper's adaptive weighting; rCM: one."""
    prior_weight: bool = True
    """Multiply by 1 / tan t once more than g = cos t df/dt has it already (sin t / tan t). A learned weighting
    undoes it in time; without one, or in a run of hundreds of updates, it leaves large t untrained: leave it out."""
    steps: tuple[float, ...] = (1.0,)
    """Levels u of the student's own process; the paper's second step is t = 1.1 of TrigFlow."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_scale(self.guidance)

    def needs(self) -> Needs:
        roles = {"student"} | (set() if self.source == "data" else {"teacher"})
        roles |= {"weighting"} if self.weighting == "learned" else set()
        return Needs(frozenset(roles), data=self.source != "trajectory", jvp=tr.forward_directions(self.tangent, "xt"))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        updates = ("student", "weighting") if self.weighting == "learned" else ("student",)
        yield Turn(updates, lambda batch: self.losses(roles, batch, step))

    def route(self) -> list[float]:
        """TrigFlow times of TBCM's route, points + 1 from the prior down: evenly spaced flow times, shifted."""
        last = shift(torch.tensor(1e-3, dtype=torch.float64), self.shift)
        s = shift(torch.linspace(1, float(last), self.points + 1, dtype=torch.float64), self.shift)
        return torch.atan2(s, 1 - s).clamp_max(Trig.t_max - 1e-4).tolist()

    def points_of(
        self, roles: Roles, batch: Batch, scale: float | Tensor = 1.0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x, t, velocity) in TrigFlow coordinates, of a teacher with this guidance scale."""
        trig = Trig()
        if self.source == "trajectory":
            teacher, edges = Teacher(trig_view(roles.teacher), batch, scale), self.route()
            t = torch.full((len(batch),), edges[0], dtype=torch.float64, device=batch.draws.device)
            with torch.no_grad():
                here = teacher(batch.noise(), t)
            for high, low in pairwise(edges):
                t = low + (high - low) * batch.draws.uniform()
                # The yield stands outside: a generator keeps its no_grad switched on for its caller.
                with torch.no_grad():
                    here = teacher(here.at(t), t)
                yield here.x, t, here.velocity()
            return
        x0, eps = batch.data(), batch.noise()
        t = self.times.sample(batch.draws, trig).clamp(1e-4, trig.t_max - 1e-4)
        x, _ = add_noise(trig, x0, eps, t)
        if self.source == "data":
            yield x, t, bc(trig.alpha(t), x) * eps - bc(trig.sigma(t), x) * x0
            return
        with torch.no_grad():
            v = Teacher(trig_view(roles.teacher), batch, scale)(x, t).velocity()
        yield x, t, v

    def losses(self, roles: Roles, batch: Batch, step: int) -> Iterator[Losses]:
        student, scale = trig_view(roles.student), drawn(self.guidance, batch.draws)
        count = self.points if self.source == "trajectory" else 1
        for x, t, v in self.points_of(roles, batch, scale):
            call = {"w": 0 * t + scale} if self.embed_guidance else {}
            here = tr.raw_of(student, "trig", batch.cond, **call)
            raw = here(x, t, torch.zeros_like(t))
            g = self.direction(here, x, t, v, raw.detach(), min(1.0, step / self.warmup))
            error = per_sample((raw - raw.detach() - g) ** 2)
            if self.prior_weight:
                error = error / torch.tan(t).to(error.dtype)
            if self.weighting == "learned":
                level = roles.weighting(roles.student.process.t_of_angle(t))
                error = torch.exp(-level) * error + level
            size = g.detach().flatten(1).norm(dim=1).mean()
            yield Losses({"scm": error.mean() / count}, {"tangent_norm": size})

    def direction(self, here: Any, x: Tensor, t: Tensor, v: Tensor, raw: Tensor, warmup: float) -> Tensor:
        """The bounded tangent (b, *d) that raw is moved by: g = cos t df/dt, eulerian's R times cos t (sec. 4.1)."""
        r, cos, sin = warmup, torch.cos(t), torch.sin(t)
        # cos t sin t dF/dt is taken with the factor inside the tangents, which keeps it finite at both ends.
        scale = cos * sin
        along = (bc(scale, x) * v, scale, None)
        moved = tr.tangent(here, (x, t, 0 * t), along, self.tangent, ceiling=Trig.t_max)
        c, cs = bc(cos, x), bc(scale, x)
        if self.fade == "rcm":
            g = -c * bc(torch.sqrt(1 - (r * sin) ** 2), x) * (raw - v) - (r * cs * x + moved)
        else:
            g = -(c**2) * (raw - v) - r * (cs * x + moved)
        return tr.bounded(g, self.c, self.normalize)

    def sampler(self) -> Sampler:
        scale = middle(self.guidance) if self.embed_guidance else None
        return Sampler(kind="renoise", steps=self.steps, guidance=scale, counts=any_steps(self.steps))


def trig_view(net: Any) -> Any:
    """The denoiser in TrigFlow coordinates with sigma_data = 1."""
    return net if isinstance(net.process, Trig) else Rescheduled(net, Trig())
