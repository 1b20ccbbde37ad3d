"""LADD: latent adversarial distillation on the teacher's features at re-noised samples (arXiv 2403.12015)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import bc
from fewstep.algebra.rollout import exit_step, rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import LogitNormal, TimesPart, check_steps
from fewstep.config import part
from fewstep.methods.gan import Gan
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.readings import of_batch
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Scale, check_scale, drawn, middle


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
    student_times: TimesPart | None = None
    """With data: levels of the student's input from this law in place of the steps (SANA-Sprint: that of sCM)."""
    prior_share: float = 0.0
    """Share of those rows that start from the prior (SANA-Sprint .5)."""
    guidance: Scale | None = None
    """Scale handed to a student that takes it as its input w; left out: none."""
    misaligned: bool = False
    """True: real samples with the condition of the row after theirs are further fakes, so that heads that read the
    condition must use it (SANA-Sprint, arXiv 2503.09641)."""
    discriminator_steps: int = 1
    """Discriminator updates per student update."""
    train_trunk: bool = False
    """True trains the critic that carries the heads; the paper's trunk is the frozen teacher."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        self.gan.alone()
        if self.guidance is not None:
            check_scale(self.guidance)
        if not 0 <= self.prior_share <= 1:
            raise ValueError(f"prior_share must lie in [0, 1], not {self.prior_share}")
        if self.student_times is not None and self.source != "data":
            raise ValueError("student_times noises data: it needs source: data")
        if self.discriminator_steps < 1:
            raise ValueError(f"discriminator_steps must be at least 1, not {self.discriminator_steps}")

    def needs(self) -> Needs:
        trunk = {"critic"} if self.train_trunk else set()
        return Needs(frozenset({"student", "discriminator"} | trunk), data=True, teacher_grad=True)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch))
        updates = ("critic", "discriminator") if self.train_trunk else ("discriminator",)
        yield Turn(updates, lambda batch: self.discriminator_losses(roles, batch), times=self.discriminator_steps)

    def sampler(self) -> Sampler:
        scale = None if self.guidance is None else middle(self.guidance)
        return Sampler(kind="renoise", steps=self.steps, guidance=scale)

    def produce(self, roles: Roles, batch: Batch, grad: bool) -> Tensor:
        """Student samples (b, *d): x0 at a step drawn for the whole update, or at levels drawn for each row."""
        w: dict[str, Any] = {} if self.guidance is None else {"w": self.scales(batch)}
        if self.source == "rollout":
            return rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond, grad=grad, **w).x
        x, t = self.start(roles.student.process, batch)
        with torch.set_grad_enabled(grad):
            return roles.student(x, t, batch.cond, **w).x0

    def scales(self, batch: Batch) -> Tensor:
        """The student's guidance input, float64 (b,)."""
        assert self.guidance is not None
        scale = drawn(self.guidance, batch.draws)
        return torch.zeros(len(batch), dtype=torch.float64, device=batch.draws.device) + scale

    def start(self, process: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's input (b, *d) and its times (b,). Pure noise where sampling starts, whatever trace of data
        the process leaves there."""
        one, draws = torch.ones(len(batch), dtype=torch.float64, device=batch.draws.device), batch.draws
        if self.student_times is None:
            level = self.steps[exit_step(draws, len(self.steps))]
            t, first = process.grid(level * one), torch.full_like(one, level == self.steps[0])
        else:
            first = (draws.uniform() < self.prior_share).double()
            t = self.student_times.sample(draws, process)
            t = torch.where(first > 0, process.grid(self.steps[0] * one), t)
        noise = batch.noise()
        mixed = add_noise(process, batch.data(), noise, t)[0]
        return torch.where(bc(first, mixed) > 0, process.prior(noise, t), mixed), t

    def student_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = self.produce(roles, batch, grad=True)
        yield Losses({"gan": self.gan.generator(roles, batch, x)}, of_batch(x, batch.cond))

    def discriminator_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        fake = self.gan.look(roles, batch, self.produce(roles, batch, grad=False))
        if self.misaligned and len(batch) > 1:
            fake = torch.cat((fake, self.gan.look(roles, batch, batch.data().roll(1, 0))))
        yield self.gan.judge(roles, batch, fake, *self.gan.shown(roles, batch, batch.data()))
