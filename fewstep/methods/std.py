"""Single Trajectory Distillation: consistency along whole teacher trajectories kept in a bank (arXiv 2412.18945)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws
from fewstep.algebra.noising import add_noise
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import check_steps
from fewstep.config import Count, part
from fewstep.data.base import Conditions, Data
from fewstep.methods.bank import Bank
from fewstep.methods.gan import Gan
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Scale, Teacher, check_scale, drawn, student_leg
from fewstep.objectives.trajectory import Distance, distance


@part("method", "std")
class STD:
    """A CD step at a banked state moves that state one teacher step on, so that training follows real trajectories."""

    cites: ClassVar[tuple[str, ...]] = ("2412.18945",)

    knots: Count = 50
    """Knots of the DDIM grid."""
    strength: float = 0.75
    """Trajectories start from noised data at knot ceil(strength knots) + 1, level .78 by default, for image-to-image as
    published. A student that is to start from noise needs 1."""
    slots: Count = 256
    """States in the bank (official: 4 for a batch of 1)."""
    rate: float = 0.8
    """Probability of taking a row from its slot rather than from fresh data. A state gets n knots below its start with
    probability rate^n: 1 - 1 / knots trains all of them, .8 on 50 knots hardly any below the first fifteen."""
    target: Literal["random", "clean"] = "random"
    """random: s uniform over the `reach` knots below the teacher's step; clean: s = 0, the consistency model (their
    mode lcm)."""
    reach: Count = 19
    """Largest distance of s below the teacher's step, in knots, for target: random."""
    guidance: Scale = 1.0
    """The teacher's scale (official: between 6 and 16)."""
    distance: Distance = "huber"
    """How the two answers are compared: huber is LCM's, of every element; huber_sample iCT's, of a sample's norm."""
    c: float = 1e-3
    """c of the pseudo-Huber distances, in units of the data (which lies in [-1, 1]); mse and l1 have none."""
    steps: tuple[float, ...] = (0.78, 0.58, 0.38, 0.18)
    """Levels, none above the start of the trajectories."""
    gan: Gan | None = None
    """The asymmetric adversarial term: a jump to s as it is, against real data at a level drawn below s, so that the
    student is cleaner than its level; both are told s, as by the level told the discriminator would know them. Its own
    `times` are refused; heads on the frozen teacher (official: on DINOv2)."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_scale(self.guidance)
        if self.gan:
            self.gan.alone(times=False)
        if not 0 < self.strength <= 1 or not 0 <= self.rate <= 1:
            raise ValueError(f"strength and rate must lie in (0, 1], [0, 1], not {self.strength}, {self.rate}")
        if self.steps[0] > self.first / self.knots:
            raise ValueError(
                f"steps {list(self.steps)} begin above level {self.first / self.knots:g}, where trajectories of "
                f"strength {self.strength} start: begin there, or set strength: 1"
            )

    @property
    def first(self) -> int:
        """The knot at which trajectories start."""
        return min(math.ceil(self.strength * self.knots) + 1, self.knots)

    def needs(self) -> Needs:
        def state(data: Data) -> nn.Module:
            return Bank(self.slots, tuple(data.shape))

        # Labels are kept beside the banked states, embeddings of text are not.
        kinds: frozenset[Conditions] = frozenset({"none", "classes"})
        roles = frozenset({"teacher", "student"} | ({"discriminator"} if self.gan else set()))
        return Needs(roles, data=True, conditions=kinds, state=state, teacher_grad=self.gan is not None)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch))
        if self.gan:
            yield Turn(("discriminator",), lambda batch: self.discriminator_losses(roles, batch))

    def time(self, process: Any, knot: Tensor) -> Tensor:
        """Process time of knots, for a discriminator: 0 at the lowest level that it can look at."""
        return process.grid((knot.double() / self.knots).clamp_min(1e-3))

    def start(self, bank: Bank, batch: Batch, process: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
        """(slot, x, knot, cond) of each row: its slot's state, or noised data at the start level."""
        slot = batch.draws.index % self.slots
        first = torch.full_like(slot, self.first)
        fresh, _ = add_noise(process, batch.data(), batch.noise(), process.grid(first.double() / self.knots))
        banked = (bank.knot[slot] > 0) & (batch.draws.uniform() < self.rate)
        x = torch.where(banked.reshape(-1, *(1,) * (fresh.ndim - 1)), bank.x[slot].to(fresh.dtype), fresh)
        cond = batch.cond
        if cond is not None:
            cond = torch.where(banked, bank.label[slot], cond)
        return slot, x, torch.where(banked, bank.knot[slot], first), cond

    def destination(self, draws: Draws, knot: Tensor) -> Tensor:
        """Knot to jump to, below the one that the teacher steps to: at that one the student would learn its step."""
        if self.target == "clean":
            return torch.zeros_like(knot)
        low, high = ((knot - k).clamp_min(0) for k in (1 + self.reach, 1))
        return low + ((high - low) * draws.uniform()).long().clamp_max((high - low - 1).clamp_min(0))

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        process, bank = roles.student.process, roles["state"]
        slot, x, knot, cond = self.start(bank, batch, process)  # type: ignore[arg-type]
        end = self.destination(batch.draws, knot)
        t, u, s = (process.grid(k.double() / self.knots) for k in (knot, knot - 1, end))
        scale = drawn(self.guidance, batch.draws)
        seen = replace(batch, cond=cond)
        own = student_leg(roles.student, cond)
        with torch.no_grad():
            x_u = Teacher(roles.teacher, seen, scale).step(x, t, u)
            target = own(x_u, u, s)
            bank.put(slot, x_u, knot - 1, cond if isinstance(cond, Tensor) else None)  # type: ignore[operator]
        jump = own(x, t, s)
        losses = Losses({"consistency": distance(jump, target, self.distance, self.c)})
        if self.gan:
            losses["gan"] = self.gan.at(roles, seen, jump, self.time(process, end))
        yield losses

    def discriminator_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        assert self.gan is not None
        process, draws = roles.student.process, batch.draws
        knot = 1 + draws.integers(self.first)
        end = self.destination(draws, knot)
        told, low = (self.time(process, k) for k in (end, (draws.uniform() * end).long()))
        t, s = (process.grid(k.double() / self.knots) for k in (knot, end))
        x, _ = add_noise(process, batch.data(), batch.noise(), t)
        with torch.no_grad():
            jump = student_leg(roles.student, batch.cond)(x, t, s)
        real, _ = add_noise(process, batch.data(), batch.noise(), low)
        yield self.gan.judge(roles, batch, roles.discriminator(jump, told, batch.cond), real, told)

    def sampler(self) -> Sampler:
        return Sampler(kind="map" if self.target == "random" else "renoise", steps=self.steps)
