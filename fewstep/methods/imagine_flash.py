"""Imagine Flash: backward distillation, shifted reconstruction and noise correction (arXiv 2405.05224)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import ask, clean, times_of
from fewstep.algebra.noising import add_noise
from fewstep.algebra.rollout import exit_step
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import check_steps
from fewstep.config import part
from fewstep.methods.gan import Gan
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.trunk import with_trunk
from fewstep.networks.roles import Roles
from fewstep.objectives import mse
from fewstep.objectives.legs import Teacher


@part("method", "imagine_flash")
class ImagineFlash:
    """The student meets only its own states; the teacher corrects its x0 from a re-noised level gamma(t)."""

    cites: ClassVar[tuple[str, ...]] = ("2405.05224",)

    steps: tuple[float, ...] = (1.0, 0.67, 0.33)
    """Levels of the student's DDIM sampler."""
    gamma: tuple[float, float] = (0.02, 0.7)
    """gamma(t) = low + (high - low) u(t): structure is corrected early, detail late (the map is not published)."""
    guidance: float = 1.0
    """The teacher's guidance scale; 1 is none."""
    reconstruction: float = 1.0
    """Weight of the shifted reconstruction loss. Alone it contracts the samples: E[D(a x + s n)] is a mean."""
    gan: Gan = Gan(weight=0.1, discriminator_weight=1.0)
    """Adversarial loss; it is what holds the variance, so it cannot be left out."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not 0 < self.gamma[0] <= self.gamma[1] <= 1:
            raise ValueError(f"gamma must satisfy 0 < low <= high <= 1, not {list(self.gamma)}")

    def needs(self) -> Needs:
        return Needs(frozenset({"teacher", "student", "critic", "discriminator"}), data=True)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch))
        yield Turn(("critic", "discriminator"), lambda batch: self.critic_losses(roles, batch))

    def backward(self, roles: Roles, batch: Batch, grad: bool = True) -> tuple[Tensor, float]:
        """(x0 of the student at a random step of its own DDIM path, that step's level); last call with gradient."""
        process = roles.student.process
        times = times_of(self.steps, process).to(batch.draws.device)
        last, b = exit_step(batch.draws, len(self.steps)), len(batch)
        x = noise = batch.noise()
        x = process.prior(noise, times[0].expand(b))
        end = clean(process, times[0].expand(b))
        for i in range(last):
            with torch.no_grad():
                answer = ask(roles.student, x, times[i].expand(b), times[i + 1].expand(b), batch.cond)
                x = answer.at(times[i + 1].expand(b))
                if i == 0:
                    x, _ = add_noise(process, answer.x0, noise, times[1].expand(b))
        with torch.set_grad_enabled(grad):
            return ask(roles.student, x, times[last].expand(b), end, batch.cond).x0, self.steps[last]

    def level(self, u: float) -> float:
        """gamma at level u."""
        return self.gamma[0] + (self.gamma[1] - self.gamma[0]) * u

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        process = roles.student.process
        x0, u = self.backward(roles, batch)
        g = process.grid(torch.full((len(batch),), self.level(u), dtype=torch.float64, device=x0.device))
        with torch.no_grad():
            seen, _ = add_noise(process, x0, batch.noise(), g)
            target = Teacher(roles.teacher, batch, self.guidance)(seen, g).x0
        losses = Losses({"reconstruct": self.reconstruction * mse(x0, target)})
        losses["gan"] = self.gan.generator(roles, batch, x0)
        yield losses

    def critic_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x, _ = self.backward(roles, batch, grad=False)
        yield with_trunk(self.gan, roles, batch, x)

    def sampler(self) -> Sampler:
        return Sampler(kind="map", steps=self.steps, keep_noise=True)
