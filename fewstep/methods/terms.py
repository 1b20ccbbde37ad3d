"""Parts that several methods share: the critic, the discriminator, distances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.condition import replaced
from fewstep.algebra.guidance import guided
from fewstep.algebra.jump import ask, clean
from fewstep.algebra.noising import add_noise
from fewstep.algebra.points import over_points
from fewstep.algebra.process import bc
from fewstep.algebra.times import TimesPart, Uniform, law_at
from fewstep.config import UserError, config
from fewstep.methods.method import Losses, Turn
from fewstep.networks.adapters import own_parameters
from fewstep.networks.roles import Roles
from fewstep.objectives.reduce import global_mean
from fewstep.objectives.regression import Weight, x0_weight
from fewstep.objectives.trajectory import distance


def noised(times: Any, roles: Roles, batch: Batch, x: Tensor, **where: Any) -> tuple[Tensor, Tensor]:
    """(x_tau, tau): x at a fresh level of `times` with fresh noise; `where` goes to times.sample."""
    process: Any = roles.student.process
    tau = law_at(times, batch.step).sample(batch.draws, process, **where)
    return add_noise(process, x, batch.noise(), tau)[0], tau


def dropped(batch: Batch, probability: float) -> Any:
    """The batch's condition with the null one in place of a random share of rows."""
    if probability == 0 or batch.cond is None or batch.null_cond is None:
        return batch.cond
    return replaced(batch.cond, batch.draws.uniform() < probability, batch.null_cond)


@config
class Gan:
    """A discriminator of real and student samples: the weights, the noise levels at which it looks, and its loss."""

    weight: float = 3e-3
    """Weight of the generator's loss (DMD2: ImageNet-64 3e-3, SD1.5 1e-3, SDXL 5e-3)."""
    discriminator_weight: float = 1e-2
    """Weight of the discriminator's loss beside the critic's (DMD2: 1e-2)."""
    times: TimesPart | None = Uniform(low=0.0, high=1.0)
    """Noise level at which the discriminator looks; null shows clean samples, at the process's lowest level."""
    loss: Literal["logistic", "hinge"] = "logistic"
    """DMD2 and GDD: logistic (softplus); LADD: hinge."""
    r1_weight: float = 0.0
    """Weight of R1 on real samples (FastGen uses 100 to 1000 on its scale)."""
    r1: Literal["finite", "exact"] = "finite"
    """finite: differences of logits (APT, arXiv 2501.08316); exact: |grad|^2, whose weight is the usual gamma / 2."""
    shares_noise: bool = False
    """True: the discriminator trains at the critic's levels, on the features of its denoising call: a pass less."""

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.discriminator_weight <= 0:
            raise ValueError("weight and discriminator_weight must be positive; `gan: null` is no discriminator")
        if self.r1_weight < 0:
            raise ValueError(f"r1_weight must not be negative, not {self.r1_weight}")

    def alone(self, times: bool = True) -> None:
        """ValueError for a key that needs a critic's turn, in methods that have none; times: whether these are read."""
        if not times and self.times != type(self)().times:
            raise ValueError("gan.times: the levels of this method's discriminator are the method's own; leave it out")
        if self.shares_noise:
            raise ValueError("gan.shares_noise: no critic trains beside the discriminator of this method")

    def shown(self, roles: Roles, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the discriminator sees of x (b, *d), and the time (b,) that it is told."""
        if self.times is not None:
            return noised(self.times, roles, batch, x)
        process: Any = roles.student.process
        return x, process.grid(torch.full((len(x),), 1e-3, dtype=torch.float64, device=x.device))

    def look(self, roles: Roles, batch: Batch, x: Tensor) -> Tensor:
        """Logits (b, heads) of x at a fresh noise level."""
        return roles.discriminator(*self.shown(roles, batch, x), batch.cond)

    def generator(self, roles: Roles, batch: Batch, x: Tensor) -> Tensor:
        """The student's weighted adversarial loss; the gradient flows through the discriminator into x."""
        return self.weight * self._fooled(self.look(roles, batch, x))

    def at(self, roles: Roles, batch: Batch, x: Tensor, t: Tensor) -> Tensor:
        """`generator` of x (b, *d) as it is, at time t (b,): no noise is added."""
        return self.weight * self._fooled(roles.discriminator(x, t, batch.cond))

    def beside(self, roles: Roles, batch: Batch, x_tau: Tensor, tau: Tensor, scale: Tensor) -> Tensor:
        """`generator` at a score term's own noised sample, times the mean of that term's `scale` (b,); a scalar.

        So SiDA and Uni-Instruct have it, 1 / <|x - D_real|> being the scale and logits within +-10
        (mingyuanzhou/SiD, sida_training/sida_loss.py).
        """
        logits = roles.discriminator(x_tau, tau, batch.cond).clamp(-10, 10)
        return self.weight * global_mean(scale.detach()) * self._fooled(logits)

    def _fooled(self, logits: Tensor) -> Tensor:
        return obj.logistic_generator(logits) if self.loss == "logistic" else obj.hinge_generator(logits)

    def discriminator(self, roles: Roles, batch: Batch, x: Tensor, fakes: Batch | None = None) -> Losses:
        """The discriminator's weighted loss on real data against detached student samples, and its accuracy.

        fakes: the batch whose conditions x was made under, where it is not `batch`.
        """
        fake = self.look(roles, fakes or batch, x.detach())
        return self.judge(roles, batch, fake, *self.shown(roles, batch, batch.data()))

    def judge(self, roles: Roles, batch: Batch, fake: Tensor, seen: Tensor, tau: Tensor, r1: float = 1.0) -> Losses:
        """`discriminator` from the logits (b, heads) of student samples and real samples seen at tau.

        r1: factor on R1's weight, 0 for none (lazy R1 takes it rarely and as many times as large).
        """
        real = roles.discriminator(seen, tau, batch.cond)
        loss = obj.logistic_discriminator if self.loss == "logistic" else obj.hinge_discriminator
        losses = Losses({"discriminator": self.discriminator_weight * loss(real, fake)})
        if r1 * self.r1_weight:

            def logits(z: Tensor) -> Tensor:
                return roles.discriminator(z, tau, batch.cond)

            exact = self.r1 == "exact"
            penalty = obj.r1_exact(logits, seen) if exact else obj.r1_finite(logits, seen, batch.noise())
            losses["r1"] = r1 * self.r1_weight * penalty
        losses.log["discriminator_accuracy"] = accuracy(real, fake)
        return losses

    def with_trunk(self, roles: Roles, batch: Batch, x: Tensor) -> Losses:
        """`discriminator`, and the trunk goes on denoising the student's samples x.

        So its features stay those of images, in methods that have the critic for its features alone.
        """
        critic = Critic() if self.times is None else Critic(times=self.times)
        if self.shares_noise:
            return critic.losses(roles, batch, x, self)
        losses = self.discriminator(roles, batch, x)
        losses["denoise"] = critic.losses(roles, batch, x)["dsm"]
        return losses


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """The share of logits (b, heads) with the right sign, without a gradient; a scalar."""
    return (((real > 0).float().mean() + (fake < 0).float().mean()) / 2).detach()


@config
class Critic:
    """The network that tracks the student's distribution by denoising its samples: where, with what weight, how often."""

    times: TimesPart = Uniform(low=0.0, high=1.0)
    """Noise level of its loss; the score difference needs all of [0, 1] where it is taken at all of it."""
    weight: Weight = "x0"
    """Weight of its x0 error: "edm" for EDM networks, "eps" for SD and SDXL (DMD2's code), "velocity" for flow networks
    (FastGen)."""
    steps: int = 1
    """Updates per student update."""
    reset_every: Annotated[int, Ge(0)] = 0
    """Student updates after which the critic is the teacher again, with a fresh optimiser whose rate begins anew and
    reaches its end there (SiD of protein backbones, every 400,000 samples, arXiv 2510.03095); 0 never."""
    alignment: Annotated[float, Ge(0), Lt(1)] = 0.0
    """IDA (SenseFlow, arXiv 2506.00523): before its turn the critic goes this share of the way to the student's weights;
    the code has 0.02 for SD3.5 Medium, 0.03 for SD3.5 Large and FLUX. Both are networks, or adapters, of one shape."""

    @property
    def cites(self) -> tuple[str, ...]:
        """Papers of what is switched on."""
        return (("2506.00523",) if self.alignment else ()) + (("2510.03095",) if self.reset_every else ())

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")

    def turn(self, roles: Roles, step: int, losses: Callable[[Batch], Iterable[Losses]], gan: Gan | None = None) -> Turn:
        """The critic's turn of a step, and in it that of the discriminator on its features; first reset and alignment."""
        if self.reset_every and step and step % self.reset_every == 0:
            self.reset(roles)
        self.align(roles)
        # Two optimisers over one trunk would cancel the weight of the GAN loss.
        updates = ("critic", "discriminator") if gan else ("critic",)
        return Turn(updates, losses, times=self.steps, life=self.reset_every or None)

    @torch.no_grad()
    def reset(self, roles: Roles) -> None:
        """critic := teacher.

        Raises:
            UserError: they are not of one shape.
        """
        told = (
            f"critic.reset_every: {self.reset_every} needs a critic of the teacher's shape, and theirs differ; give "
            "critic: {name: copy, of: teacher}, or 0"
        )
        for mine, theirs in _beside(roles, "teacher", told):
            mine.copy_(theirs)

    @torch.no_grad()
    def align(self, roles: Roles) -> None:
        """critic := (1 - alignment) critic + alignment student, over each role's own weights.

        Raises:
            UserError: they are not of one shape.
        """
        if not self.alignment:
            return
        told = (
            f"critic.alignment: {self.alignment} needs a critic of the student's shape, whole networks or adapters "
            "of one rank, and theirs differ; let the critic be such a copy, or give 0"
        )
        for mine, theirs in _beside(roles, "student", told):
            mine.lerp_(theirs, self.alignment)

    def losses(
        self,
        roles: Roles,
        batch: Batch,
        x: Tensor,
        gan: Gan | None = None,
        *,
        fakes: Batch | None = None,
        drop_cond: float = 0.0,
        guidance: float = 1.0,
    ) -> Losses:
        """Denoising score matching of student samples x (b, *d), `dsm`, and beside it the discriminator's terms.

        Args:
            fakes: the batch whose conditions x was made under, where it is not `batch`.
            drop_cond: share of rows that lose their condition.
            guidance: scale at which the critic is trained, through both halves of the guided call (SiD-LSG).
        """
        process: Any = roles.student.process
        x, fakes = x.detach(), fakes or batch
        t, eps = law_at(self.times, batch.step).sample(batch.draws, process), batch.noise()
        x_t, _ = add_noise(process, x, eps, t)
        taps = roles.discriminator.taps if gan and gan.shares_noise else ()
        cond = dropped(fakes, drop_cond)
        denoised = guided(roles.critic, x_t, t, cond, fakes.null_cond, guidance, taps=taps)
        weight = over_points(x0_weight(self.weight, process, t), cond)
        losses = Losses({"dsm": obj.mse(denoised.x0, x, weight)})
        if gan and gan.shares_noise:
            # Real and fake must come from one distribution of levels, or the logit learns the level's odds.
            fake = roles.discriminator.logits(denoised.features)
            seen, _ = add_noise(process, batch.data(), batch.noise(), t)
            return losses.join(gan.judge(roles, batch, fake, seen, t))
        return losses.join(gan.discriminator(roles, batch, x, fakes)) if gan else losses


def _beside(roles: Roles, other: str, told: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The critic's own weights, each with the other role's on its device; UserError in these words for other shapes."""
    critic, others = (own_parameters(roles[name]) for name in ("critic", other))
    if [p.shape for p in critic] != [p.shape for p in others]:
        raise UserError(told)
    return ((mine, theirs.to(mine.device)) for mine, theirs in zip(critic, others, strict=True))


def check_one_life(methods: Sequence[Any]) -> None:
    """ValueError where methods that train one critic let it be the teacher again after different numbers of updates."""
    training = [m for m in methods if "critic" in m.needs().trained]
    lives = [(m.name, getattr(getattr(m, "critic", None), "reset_every", 0)) for m in training]
    if len({every for _, every in lives}) > 1:
        told = ", ".join(f"{name} {every}" for name, every in lives)
        raise ValueError(f"methods have one critic, so their critic.reset_every must be equal, not {told}")


Apart = Literal["mse", "l1", "huber", "huber_sample", "lpips"]
"""A distance of trajectory methods, or LPIPS by the frozen role `perceptual`."""


def apart(roles: Roles, a: Tensor, b: Tensor, kind: Apart, c: float = 1e-3, weight: Tensor | None = None) -> Tensor:
    """The batch mean of weight (b,) times a distance of samples a and b (b, *d), a scalar."""
    if kind != "lpips":
        return distance(a, b, kind, c, weight)
    value = roles.perceptual(a, b)
    return (value if weight is None else value * weight.to(value.dtype)).mean()


def perceptual(kind: Any) -> set[str]:
    """The roles that a distance needs."""
    return {"perceptual"} if kind == "lpips" else set()


def discriminate(gan: Gan | None, roles: Roles, batch: Batch, times: Any) -> Iterator[Losses]:
    """The critic turn of a trajectory method: its discriminator on the student's jumps from noised data to clean."""
    assert gan is not None
    process: Any = roles.student.process
    with torch.no_grad():
        noised_data, t = noised(times, roles, batch, batch.data())
        end = clean(process, t)
        x = ask(roles.student, noised_data, t, end, batch.cond).at(end)
    yield gan.with_trunk(roles, batch, x)


def scaled(c: Tensor, x: Tensor) -> Tensor:
    """c (b,) times x (b, *d)."""
    return bc(c, x) * x
