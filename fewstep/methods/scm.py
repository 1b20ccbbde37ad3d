"""sCM: Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models (arXiv 2410.11081), and TBCM's source."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.process import Trig, add_noise, bc
from fewstep.algebra.sampling import Sampler, any_steps
from fewstep.algebra.times import TrigLogNormal, check_steps
from fewstep.config import choice, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.denoiser import Rescheduled
from fewstep.networks.roles import Roles
from fewstep.objectives import trajectory as tr
from fewstep.objectives.legs import Teacher
from fewstep.objectives.regression import per_sample


@part("method", "scm")
class SCM:
    """The Eulerian limit at s = 0 in TrigFlow, whatever process the student speaks; it is rescheduled here."""

    cites: ClassVar[tuple[str, ...]] = ("2410.11081",)

    source: Literal["teacher", "data", "trajectory"] = "teacher"
    """teacher: sCD, velocity of the teacher at noised data; data: sCT, velocity of the pair (x0, eps);
    trajectory: points on the teacher's own path from noise, without data (TBCM, arXiv 2511.20410)."""
    times: choice("times") = TrigLogNormal(sigma_data=1.0)  # type: ignore[valid-type]
    """TrigFlow times; the paper's e^N(-1, 1.4^2) / sigma_data, with data scaled to 1 here."""
    points: PositiveInt = 4
    """TBCM: points taken from each teacher trajectory, one per interval of its grid."""
    guidance: float = 1.0
    tangent: tr.Tangent = "jvp"
    warmup: PositiveInt = 10_000
    """Updates over which the unstable part of the tangent is faded in (sec. 4.1)."""
    normalize: Literal["rms", "l2"] = "l2"
    """Norm of the tangent normalisation g / (|g| + c)."""
    c: float = 0.1
    """Its constant. Below |g| it makes every g a direction: right in many dimensions, where all |g| are alike; in two
    a c near |g| keeps the mean of a noisy g (sCT) where it was."""
    weighting: Literal["learned", "one"] = "one"
    """learned: e^-l error + l with the role `weighting` (a logvar network), the paper's adaptive weighting."""
    prior_weight: bool = True
    """Multiply by 1 / tan t once more than g = cos t df/dt has it already (sin t / tan t). A learned weighting
    undoes it in time; a run of hundreds of updates spends itself on small t, so leave it out there."""
    steps: tuple[float, ...] = (1.0,)
    """Levels u of the student's own process; the paper's second step is t = 1.1 of TrigFlow."""

    def __post_init__(self) -> None:
        check_steps(self.steps)

    def needs(self) -> Needs:
        roles = {"student"} | (set() if self.source == "data" else {"teacher"})
        roles |= {"weighting"} if self.weighting == "learned" else set()
        return Needs(
            frozenset(roles), data=self.source != "trajectory", jvp=tr.forward_directions(self.tangent, "xt")
        )

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        updates = ("student", "weighting") if self.weighting == "learned" else ("student",)
        yield Turn(updates, lambda batch: self.losses(roles, batch, step))

    def points_of(self, roles: Roles, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x, t, velocity) in TrigFlow coordinates."""
        trig = Trig()
        if self.source == "trajectory":
            teacher = Teacher(trig_view(roles.teacher), batch, self.guidance)
            edges = torch.linspace(trig.t_max - 1e-4, 1e-3, self.points + 1, dtype=torch.float64)
            x, t = batch.noise(), edges[0].expand(len(batch)).to(batch.draws.device)
            for high, low in pairwise(edges.tolist()):
                there = low + (high - low) * batch.draws.uniform()
                # The yield stands outside: a generator keeps its no_grad switched on for its caller.
                with torch.no_grad():
                    x, t = teacher.step(x, t, there), there
                    v = teacher(x, t).velocity()
                yield x, t, v
            return
        x0, eps = batch.data(), batch.noise()
        t = self.times.sample(batch.draws, trig).clamp(1e-4, trig.t_max - 1e-4)
        x, _ = add_noise(trig, x0, eps, t)
        if self.source == "data":
            yield x, t, bc(trig.alpha(t), x) * eps - bc(trig.sigma(t), x) * x0
            return
        with torch.no_grad():
            v = Teacher(trig_view(roles.teacher), batch, self.guidance)(x, t).velocity()
        yield x, t, v

    def losses(self, roles: Roles, batch: Batch, step: int) -> Iterator[Losses]:
        student = trig_view(roles.student)
        for x, t, v in self.points_of(roles, batch):
            here = tr.raw_of(student, "trig", batch.cond)
            raw = here(x, t, torch.zeros_like(t))
            g = self.direction(here, x, t, v, raw.detach(), min(1.0, step / self.warmup))
            error = per_sample((raw - raw.detach() - g) ** 2)
            if self.prior_weight:
                error = error / torch.tan(t).to(error.dtype)
            if self.weighting == "learned":
                level = roles.weighting(roles.student.process.t_of_angle(t))
                error = torch.exp(-level) * error + level
            yield Losses({"scm": error.mean()}, {"tangent_norm": g.detach().flatten(1).norm(dim=1).mean()})

    def direction(self, here: Any, x: Tensor, t: Tensor, v: Tensor, raw: Tensor, warmup: float) -> Tensor:
        """The bounded tangent (b, *d) that raw is moved by: g = cos t df/dt, eulerian's R times cos t (sec. 4.1)."""
        s = torch.zeros_like(t)
        # cos t sin t dF/dt is taken with the factor inside the tangents, which keeps it finite at both ends.
        scale = torch.cos(t) * torch.sin(t)
        moved = tr.tangent(here, (x, t, s), (bc(scale, x) * v, scale, None), self.tangent)
        c, cs = bc(torch.cos(t), x), bc(scale, x)
        g = -(c**2) * (raw - v) - warmup * (cs * x + moved)
        return tr.bounded(g, self.c, self.normalize)

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps, counts=any_steps(self.steps))


def trig_view(net: Any) -> Any:
    """The denoiser in TrigFlow coordinates with sigma_data = 1."""
    return net if isinstance(net.process, Trig) else Rescheduled(net, Trig())
