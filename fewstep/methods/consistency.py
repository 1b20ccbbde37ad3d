"""Consistency models (arXiv 2303.01469): CD, CT, iCT (2310.14189), ECT (2406.14548), LCM (2310.04378), CoDi."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import Solver, ask, clean, clean_of
from fewstep.algebra.noising import add_noise
from fewstep.algebra.pairings import CTGrid, Grid, PairingPart, ct_decay, ct_points
from fewstep.algebra.sampling import Sampler, any_steps
from fewstep.algebra.times import check_steps
from fewstep.config import Decay, NotNegative, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.terms import Apart, apart, perceptual
from fewstep.networks.roles import Roles
from fewstep.objectives import mse
from fewstep.objectives.legs import Scale, Teacher, check_scale, drawn, middle
from fewstep.objectives.trajectory import follow


@part("method", "consistency")
class Consistency:
    """Answers at two neighbouring times agree. source teacher: CD and LCM; source data: CT, iCT, ECT."""

    cites: ClassVar[tuple[str, ...]] = ("2303.01469", "2310.14189", "2406.14548", "2310.04378", "2310.01407")

    source: Literal["teacher", "data"] = "teacher"
    """How x_u follows from x_t: one step of the teacher's solver (CD), or the same data and noise (CT)."""
    pairing: PairingPart = Grid()
    """The two times: grid (CD, LCM), ct, ict, ect."""
    ode: Literal["teacher", "target"] = "teacher"
    """Whose step leads from x_t to x_u: the frozen teacher's, or that of the target network itself, unguided, which needs
    no teacher (CoDi's released configuration: what it knows of the condition's picture the teacher does not)."""
    solver: Solver = "heun"
    """CD: heun; LCM and CoDi: ddim; ECT's distillation: euler."""
    guidance: Scale = 1.0
    """The teacher's guidance scale (LCM: between 6 and 16 in the w = 1 is none convention)."""
    embed_guidance: bool = False
    """True: the student takes the scale as its input w (LCM); it must be built with inputs: [w]."""
    distance: Apart = "mse"
    """CD mse or lpips (with a role `perceptual` of network lpips), iCT and ECT huber_sample, LCM huber."""
    c: float = 1e-3
    """Constant of the Huber distances: LCM 1e-3; iCT .00054 and ECT 0 (1e-8), both on the root mean square."""
    weight: Literal["one", "gap"] = "one"
    """one (CD, CT, LCM), gap: 1 / (t - u) (iCT, ECT)."""
    data_weight: NotNegative = 0.0
    """Weight of <|answer - x0|^2> beside it (CoDi: 1). A student that is shown a picture which its teacher does not know
    learns it by this alone; the spread of its samples falls."""
    target_decay: Decay | Literal["ct"] | None = None
    """None: the target is the student itself (iCT, ECT). A number: its EMA in the role `target` (CD .95, LCM
    .95). ct: the curriculum mu(k) of CT."""
    steps: tuple[float, ...] = (1.0,)
    """Levels u at which it is sampled, with re-noising."""
    sample_guidance: float | None = None
    """Scale at sampling when it is embedded; the middle of `guidance` when left out."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_scale(self.guidance)
        if self.target_decay == "ct" and not isinstance(self.pairing, CTGrid):
            raise ValueError("target_decay: ct needs the pairing ct, whose grid sets it")
        if self.ode == "target" and (self.source == "data" or self.guidance != 1.0):
            raise ValueError(
                "ode target: is a step of source teacher by the target's own answer, without guidance, whose gradient "
                "grows step by step; leave source at teacher and guidance at 1, or take ode teacher"
            )

    def needs(self) -> Needs:
        roles = {"student"} | ({"teacher"} if (self.source, self.ode) == ("teacher", "teacher") else set())
        roles |= perceptual(self.distance) | ({"target"} if self.target_decay is not None else set())
        return Needs(frozenset(roles), data=True, frozen=frozenset({"teacher", "target", "perceptual"}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch, step))
        if self.target_decay is not None:
            follow(roles.target, roles.student, self.decay(step))

    def decay(self, step: int) -> float:
        """The target's EMA decay at a step."""
        if self.target_decay == "ct":
            p: Any = self.pairing
            return ct_decay(ct_points(min(step, p.total), p.total, p.start, p.end), p.start, p.decay)
        return float(self.target_decay or 0.0)

    def losses(self, roles: Roles, batch: Batch, step: int) -> Iterator[Losses]:
        process: Any = roles.student.process
        t, u = self.pairing.sample(batch.draws, process, step)
        x0, eps = batch.data(), batch.noise()
        x_t, _ = add_noise(process, x0, eps, t)
        scale = drawn(self.guidance, batch.draws)
        call = {"w": t * 0 + scale} if self.embed_guidance else {}
        target_net = roles.student if self.target_decay is None else roles.target
        end = clean(process, t)
        with torch.no_grad():
            if self.source == "teacher":
                leads = roles.teacher if self.ode == "teacher" else target_net
                x_u = Teacher(leads, batch, scale, self.solver).step(x_t, t, u)
            else:
                x_u, _ = add_noise(process, x0, eps, u)
            target = clean_of(target_net, x_u, u, batch.cond, **call)
        weight = None if self.weight == "one" else 1 / (t - u).clamp_min(1e-6)
        here = ask(roles.student, x_t, t, end, batch.cond, **call).x0
        losses = Losses({"consistency": apart(roles, here, target, self.distance, self.c, weight)})
        if self.data_weight:
            losses["data"] = self.data_weight * mse(here, x0)
        yield losses

    def sampler(self) -> Sampler:
        scale = middle(self.guidance) if self.sample_guidance is None else self.sample_guidance
        return Sampler(
            kind="renoise",
            steps=self.steps,
            guidance=scale if self.embed_guidance else None,
            counts=any_steps(self.steps),
            knots=self.pairing.points - 1 if isinstance(self.pairing, Grid) else None,
        )
