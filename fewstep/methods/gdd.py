"""GDD: a teacher's weights are an innate one-step generator; a GAN alone brings it out (arXiv 2405.20750)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from fewstep.algebra.batch import Batch
from fewstep.algebra.rollout import rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import check_steps
from fewstep.config import part
from fewstep.methods.gan import Gan
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.readings import of_batch
from fewstep.networks.roles import Roles


@part("method", "gdd")
class GDD:
    """Only an adversarial loss on the student's samples. GDD-I freezes most convolutions: `freeze`.

    With `gan.times` set, the discriminator sees noised samples, which on the teacher's features is LADD.
    """

    cites: ClassVar[tuple[str, ...]] = ("2405.20750",)

    steps: tuple[float, ...] = (1.0,)
    """Levels u of the student; the paper has one, sigma 80."""
    gan: Gan = Gan(weight=1.0, discriminator_weight=1.0, times=None, r1="exact", r1_weight=0.005)
    """Logistic, on clean samples, with the official R1 of gamma 0.01; there is no other loss to weigh."""
    r1_every: int = 16
    """R1 is taken every so many steps and weighted as many times (official: 16)."""
    discriminator_steps: int = 1
    """Discriminator updates per student update."""
    freeze: tuple[str, ...] = ()
    """GDD-I: student parameters whose name holds one of these never move (official: conv, proj, then qkv, skip
    inside the blocks). Norms learn, conv_norm_out too, unless an entry names them."""
    train_trunk: bool = False
    """True trains the critic that carries the heads with them, for runs without a pre-trained trunk."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        self.gan.alone()
        for name in ("r1_every", "discriminator_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def needs(self) -> Needs:
        trunk = {"critic"} if self.train_trunk else set()
        return Needs(frozenset({"student", "discriminator"} | trunk), data=True)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch))
        updates = ("critic", "discriminator") if self.train_trunk else ("discriminator",)
        r1 = 0.0 if step % self.r1_every else float(self.r1_every)
        yield Turn(updates, lambda batch: self.discriminator_losses(roles, batch, r1), times=self.discriminator_steps)

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps)

    def hold(self, roles: Roles) -> None:
        """Take the frozen parameters out of this turn's graph; without a gradient no optimiser moves them."""
        for name, parameter in roles.student.named_parameters():
            if any(part in name and ("norm" in part or "norm" not in name) for part in self.freeze):
                parameter.requires_grad_(False)

    def student_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        self.hold(roles)
        x = rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond).x
        yield Losses({"gan": self.gan.generator(roles, batch, x)}, of_batch(x, batch.cond))

    def discriminator_losses(self, roles: Roles, batch: Batch, r1: float) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.steps, batch.cond, grad=False).x
        fake = self.gan.look(roles, batch, x)
        yield self.gan.judge(roles, batch, fake, *self.gan.shown(roles, batch, batch.data()), r1)
