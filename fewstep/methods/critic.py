"""The critic of a method: where it denoises the student's samples, how often, reset and alignment; its turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.guidance import guided
from fewstep.algebra.noising import add_noise
from fewstep.algebra.points import over_points
from fewstep.algebra.times import TimesPart, Uniform, law_at
from fewstep.config import UserError, config
from fewstep.methods.gan import Gan
from fewstep.methods.method import Losses, Turn
from fewstep.methods.terms import dropped
from fewstep.networks.adapters import own_parameters
from fewstep.networks.roles import Roles
from fewstep.objectives.regression import Weight, x0_weight


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
