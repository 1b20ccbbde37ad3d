"""LADD: latent adversarial distillation on the teacher's features at re-noised samples (arXiv 2403.12015)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.process import add_noise
from fewstep.algebra.rollout import exit_step, rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import LogitNormal, check_steps
from fewstep.config import part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.readings import spread
from fewstep.methods.terms import Gan
from fewstep.networks.roles import Roles


@part("method", "ladd")
class LADD:
    """A hinge GAN whose discriminator reads a frozen denoiser's features of noised samples."""

    cites: ClassVar[tuple[str, ...]] = ("2403.12015",)

    steps: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    """Levels u of the student (paper: 1, 0.75, 0.5, 0.25)."""
    source: Literal["data", "rollout"] = "data"
    """Student input: data noised to one of the steps (paper), or the student's own samples, which needs none."""
    gan: Gan = Gan(weight=1.0, discriminator_weight=1.0, times=LogitNormal(mean=1.0, std=1.0), loss="hinge")
    """Hinge, at logit-normal levels (paper, mean 1 and std 1 for the final model); there is no other loss to weigh."""
    discriminator_steps: int = 1
    """Discriminator updates per student update."""
    train_trunk: bool = False
    """True trains the critic that carries the heads; the paper's trunk is the frozen teacher."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        self.gan.alone()
        if self.discriminator_steps < 1:
            raise ValueError(f"discriminator_steps must be at least 1, not {self.discriminator_steps}")

    def needs(self) -> Needs:
        trunk = {"critic"} if self.train_trunk else set()
        return Needs(frozenset({"student", "discriminator"} | trunk), data=True, teacher_grad=True)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch))
        updates = ("critic", "discriminator") if self.train_trunk else ("discriminator",)
        yield Turn(
            updates, lambda batch: self.discriminator_losses(roles, batch), times=self.discriminator_steps
        )

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps)

    def produce(self, roles: Roles, batch: Batch, grad: bool) -> Tensor:
        """Student samples (b, *d): x0 at a step drawn for the whole update."""
        if self.source == "rollout":
            return rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond, grad=grad).x
        process: Any = roles.student.process
        level = self.steps[exit_step(batch.draws, len(self.steps))]
        t = process.grid(torch.full((len(batch),), level, dtype=torch.float64, device=batch.draws.device))
        noise = batch.noise()
        # At the first step the sampler starts from pure noise, whatever trace of data the process leaves there.
        x_t = (
            process.prior(noise, t)
            if level == self.steps[0]
            else add_noise(process, batch.data(), noise, t)[0]
        )
        with torch.set_grad_enabled(grad):
            return roles.student(x_t, t, batch.cond).x0

    def student_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = self.produce(roles, batch, grad=True)
        yield Losses(
            {"gan": self.gan.generator(roles, batch, x)}, {"health/diversity": spread(x, batch.cond)}
        )

    def discriminator_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        yield self.gan.discriminator(roles, batch, self.produce(roles, batch, grad=False))
