"""CTM: Consistency Trajectory Models (arXiv 2310.02279), and the three terms of TraFlow by weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws
from fewstep.algebra.jump import Solver, clean
from fewstep.algebra.noising import add_noise
from fewstep.algebra.sampling import Sampler, any_steps
from fewstep.algebra.times import HalfLogNormal, TimesPart, Uniform, check_steps
from fewstep.config import Count, Decay, part
from fewstep.methods.gan import Gan
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.terms import Apart, apart, perceptual
from fewstep.methods.trunk import discriminate
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Teacher, frozen_leg, student_leg, time_between
from fewstep.objectives.regression import Weight, dsm
from fewstep.objectives.trajectory import distance, follow, two_leg


@part("method", "ctm")
class CTM:
    """Jumps to any s agree with a teacher leg t -> u followed by the student's jump u -> s."""

    cites: ClassVar[tuple[str, ...]] = ("2310.02279",)

    points: int | None = 40
    """Points of the grid that t, u and s are taken from (CTM: CIFAR-10 18, ImageNet-64 40): a leg of n intervals has
    probability ~ n and the teacher takes n steps on it; None: any times."""
    times: TimesPart = Uniform(low=0.0, high=1.0)
    """Without points: start t of the jump."""
    teacher_steps: Count = 2
    """Without points: solver steps of the teacher's leg."""
    solver: Solver = "heun"
    """Solver of the teacher's leg; heun takes two calls a step, the others one."""
    guidance: float = 1.0
    """The teacher's guidance scale; 1 is none."""
    compare: Literal["s", "clean"] = "clean"
    """Where the two are compared: both carried to the clean end by a frozen net (CTM, eq. 8), or at s."""
    target_decay: Decay | None = 0.999
    """That net is the student's EMA in the role `target` (official .999); None: the student itself."""
    weight: Literal["one", "chord"] = "one"
    """chord: 1 / (t - s)^2, an error of the chord's velocity."""
    distance: Apart = "mse"
    """Paper: lpips, with the role `perceptual`."""
    consistency_weight: float = 1.0
    """Weight of the comparison of the two ways to s."""
    reconstruction_weight: float = 0.0
    """TraFlow: the jump against the teacher's whole path t -> s."""
    velocity_weight: float = 0.0
    """TraFlow: the chord's velocity against the teacher's path, (x_t - J) / (t - s)."""
    denoise_weight: float = 1.0
    """Denoising at s = t on data (CTM, eq. 12)."""
    denoise_times: TimesPart = HalfLogNormal()
    """Noise levels of that denoising."""
    denoise_error: Weight = "edm"
    """Weight of its x0 error (official: 1 / sigma^2 + 1 / sigma_d^2)."""
    gan: Gan | None = None
    """Adversarial loss on the jump carried to the clean end; left out: none."""
    gan_from: int = 0
    """Update from which the student sees it (the paper begins after 10k)."""
    steps: tuple[float, ...] = (1.0,)
    """Levels u that the student is sampled at; other numbers of steps are allowed too."""
    gamma: float = 0.0
    """Sampling: the way to s leads through sqrt(1 - gamma^2) s; 0 follows the map, 1 re-noises."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.points is not None and self.points < 2:
            raise ValueError(f"points must be at least 2, not {self.points}; leave it null for any times")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], not {self.gamma}")

    @property
    def averaged(self) -> bool:
        """Whether the jump to the clean end is that of the role `target`."""
        return self.compare == "clean" and self.target_decay is not None

    def needs(self) -> Needs:
        roles = {"teacher", "student"} | ({"critic", "discriminator"} if self.gan else set())
        roles |= perceptual(self.distance) | ({"target"} if self.averaged else set())
        return Needs(frozenset(roles), data=True, frozen=frozenset({"teacher", "target", "perceptual"}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        gan = self.gan if step >= self.gan_from else None
        yield Turn(("student",), lambda batch: self.losses(roles, batch, gan))
        if self.averaged:
            follow(roles.target, roles.student, float(self.target_decay or 0))
        if self.gan:
            yield Turn(("critic", "discriminator"), lambda batch: discriminate(self.gan, roles, batch, self.times))

    def legs(self, draws: Draws, process: Any) -> tuple[Tensor, Tensor, Tensor, int]:
        """(t, u, s), t >= u >= s, and the number of solver steps from t to u."""
        if self.points is None:
            t = self.times.sample(draws, process)
            s = time_between(process, draws, clean(process, t), t)
            return t, time_between(process, draws, s, t), s, self.teacher_steps
        top = self.points - 1
        # One length for the whole update, as a longer leg has more calls: n with probability ~ n.
        place, steps = draws.shared_integer(top * (top + 1) // 2), 1
        while place >= steps * (steps + 1) // 2:
            steps += 1
        t = steps + draws.integers(top - steps + 1)
        s = ((t - steps + 1) * draws.uniform()).long()
        t, u, s = (process.grid(k.double() / top) for k in (t, t - steps, s))
        return t, u, s, steps

    def losses(self, roles: Roles, batch: Batch, gan: Gan | None = None) -> Iterator[Losses]:
        student, process = roles.student, roles.student.process
        t, u, s, steps = self.legs(batch.draws, process)
        end = clean(process, t)
        x, _ = add_noise(process, batch.data(), batch.noise(), t)
        teacher = Teacher(roles.teacher, batch, self.guidance, self.solver).walk(steps)
        own = student_leg(student, batch.cond)
        here = own(x, t, s)
        losses, gap = Losses(), (t - s).clamp_min(1e-3)
        weight = None if self.weight == "one" else gap**-2
        if self.consistency_weight:
            there, goal = here, two_leg(teacher, own, x, t, u, s)
            if self.compare == "clean":
                outer = frozen_leg(roles.target if self.averaged else student, batch.cond)
                there, weight = outer(here, s, end), None
                with torch.no_grad():
                    goal = outer(goal, s, end)
            error = apart(roles, there, goal, self.distance, weight=weight)
            losses["consistency"] = self.consistency_weight * error
        if self.reconstruction_weight or self.velocity_weight:
            with torch.no_grad():
                path = teacher(x, t, s)
            losses["reconstruct"] = self.reconstruction_weight * apart(roles, here, path, self.distance)
            losses["velocity"] = self.velocity_weight * distance(here, path, "mse", weight=gap**-2)
        if self.denoise_weight:
            t = self.denoise_times.sample(batch.draws, process).clamp_min(1e-3)
            loss = dsm(student, batch.data(), t, batch.noise(), batch.cond, weight=self.denoise_error)
            losses["denoise"] = self.denoise_weight * loss
        if gan:
            losses["gan"] = gan.generator(roles, batch, own(x, t, end))
        yield losses

    def sampler(self) -> Sampler:
        kind: Any = "gamma" if self.gamma else "map"
        eta, knots = 1 - (1 - self.gamma**2) ** 0.5, self.points and self.points - 1
        return Sampler(kind=kind, steps=self.steps, eta=eta, counts=any_steps(self.steps), knots=knots)
