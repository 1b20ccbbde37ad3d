"""CTM: Consistency Trajectory Models (arXiv 2310.02279), and the three terms of TraFlow by weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import Solver, ask, clean
from fewstep.algebra.process import add_noise
from fewstep.algebra.sampling import Sampler, any_steps
from fewstep.algebra.times import Uniform, check_steps
from fewstep.config import choice, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.terms import Gan, discriminate
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Teacher, student_leg, time_between
from fewstep.objectives.regression import dsm
from fewstep.objectives.trajectory import Distance, distance, two_leg


@part("method", "ctm")
class CTM:
    """Jumps to any s agree with a teacher leg t -> u followed by the student's jump u -> s."""

    cites: ClassVar[tuple[str, ...]] = ("2310.02279",)

    times: choice("times") = Uniform(low=0.0, high=1.0)  # type: ignore[valid-type]
    """Start t of the jump."""
    teacher_steps: PositiveInt = 2
    """Solver steps of the teacher's leg."""
    solver: Solver = "heun"
    guidance: float = 1.0
    compare: Literal["s", "clean"] = "s"
    """Where the two are compared: at s, or both carried to the clean end by the frozen student (CTM, eq. 8)."""
    weight: Literal["one", "chord"] = "one"
    """chord: 1 / (t - s)^2, an error of the chord's velocity."""
    distance: Distance = "mse"
    consistency_weight: float = 1.0
    reconstruction_weight: float = 0.0
    """TraFlow: the jump against the teacher's whole path t -> s."""
    velocity_weight: float = 0.0
    """TraFlow: the chord's velocity against the teacher's path, (x_t - J) / (t - s)."""
    denoise_weight: float = 1.0
    """Denoising at s = t on data (CTM, eq. 12)."""
    gan: Gan | None = None
    """Adversarial loss on the jump carried to the clean end; left out: none."""
    gan_from: int = 0
    """Update from which the student sees it (the paper begins after 10k)."""
    steps: tuple[float, ...] = (1.0,)
    eta: float = 0.0
    """Sampling: 0 follows the map, 1 re-noises (CTM's gamma)."""

    def __post_init__(self) -> None:
        check_steps(self.steps)

    def needs(self) -> Needs:
        roles = {"teacher", "student"} | ({"critic", "discriminator"} if self.gan else set())
        return Needs(frozenset(roles), data=True)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        gan = self.gan if step >= self.gan_from else None
        yield Turn(("student",), lambda batch: self.losses(roles, batch, gan))
        if self.gan:
            yield Turn(
                ("critic", "discriminator"), lambda batch: discriminate(self.gan, roles, batch, self.times)
            )

    def losses(self, roles: Roles, batch: Batch, gan: Gan | None = None) -> Iterator[Losses]:
        student, process = roles.student, roles.student.process
        t = self.times.sample(batch.draws, process)
        end = clean(process, t)
        s = time_between(process, batch.draws, end, t)
        u = time_between(process, batch.draws, s, t)
        x, _ = add_noise(process, batch.data(), batch.noise(), t)
        teacher = Teacher(roles.teacher, batch, self.guidance, self.solver).walk(self.teacher_steps)
        own = student_leg(student, batch.cond)
        here = own(x, t, s)
        losses = Losses()
        gap = (t - s).clamp_min(1e-3)
        weight = None if self.weight == "one" else gap**-2
        if self.consistency_weight:
            target = two_leg(teacher, own, x, t, u, s)
            if self.compare == "clean":
                frozen = _without_gradient(student)
                there = frozen(here, s, end, batch.cond)
                with torch.no_grad():
                    goal = own(target, s, end)
                losses["consistency"] = self.consistency_weight * distance(there, goal, self.distance)
            else:
                losses["consistency"] = self.consistency_weight * distance(
                    here, target, self.distance, weight=weight
                )
        if self.reconstruction_weight or self.velocity_weight:
            with torch.no_grad():
                path = teacher(x, t, s)
            losses["reconstruct"] = self.reconstruction_weight * distance(here, path, self.distance)
            losses["velocity"] = self.velocity_weight * distance(here, path, "mse", weight=gap**-2)
        if self.denoise_weight:
            loss = dsm(student, batch.data(), t.clamp_min(1e-3), batch.noise(), batch.cond)
            losses["denoise"] = self.denoise_weight * loss
        if gan:
            losses["gan"] = gan.generator(roles, batch, own(x, t, end))
        yield losses

    def sampler(self) -> Sampler:
        kind: Any = "gamma" if self.eta else "map"
        return Sampler(kind=kind, steps=self.steps, eta=self.eta, counts=any_steps(self.steps))


def _without_gradient(net: Any) -> Any:
    """The student's jump with gradients to x but none to its weights."""
    weights = {n: p.detach() for n, p in net.named_parameters()}

    def jump(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, cond: Any) -> torch.Tensor:
        def call(x: torch.Tensor, t: torch.Tensor, cond: Any = None, **rest: Any) -> Any:
            return torch.func.functional_call(net, weights, (x, t, cond), rest)

        call.takes_s = getattr(net, "takes_s", False)  # type: ignore[attr-defined]
        return ask(call, x, t, s, cond).at(s)

    return jump
