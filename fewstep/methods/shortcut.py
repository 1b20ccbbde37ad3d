"""Shortcut models (arXiv 2410.12557): one jump equals two of half the length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws
from fewstep.algebra.jump import ask
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import bc
from fewstep.algebra.sampling import Sampler
from fewstep.config import Count, Decay, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles
from fewstep.objectives import mse
from fewstep.objectives.legs import Leg, Teacher
from fewstep.objectives.trajectory import follow, two_leg


@part("method", "shortcut")
class Shortcut:
    """Both legs are the student; flow matching at s = t anchors the finest scale."""

    cites: ClassVar[tuple[str, ...]] = ("2410.12557",)

    finest: Count = 128
    """Largest number of steps, a power of two: jumps of 1, 1/2, .. 1/finest."""
    bootstrap: float = 0.125
    """Share of the batch for the two-leg loss; the rest is flow matching (official code 1/8, paper 1/4)."""
    source: Literal["data", "teacher"] = "data"
    """Flow matching onto eps - x0 (from scratch) or onto the teacher's velocity."""
    guidance: float = 1.0
    """The teacher's scale, for source: teacher; 1 is none."""
    target_decay: Decay | None = 0.999
    """None: targets by the student itself; a number: by its EMA in the role `target` (paper .999)."""
    counts: tuple[Count, ...] = (1, 2, 4, 8)
    """Numbers of steps it may be sampled with, powers of two below `finest`: the finest jump itself is untrained."""

    def __post_init__(self) -> None:
        if self.finest & (self.finest - 1) or any(n & (n - 1) or n >= self.finest for n in self.counts):
            raise ValueError(
                f"finest must be a power of two and counts powers of two below it, not {self.finest}, {list(self.counts)}"
            )
        if not 0 <= self.bootstrap <= 1:
            raise ValueError(f"bootstrap must lie in [0, 1], not {self.bootstrap}")

    def needs(self) -> Needs:
        roles = {"student"} | ({"teacher"} if self.source == "teacher" else set())
        roles |= {"target"} if self.target_decay is not None else set()
        frozen, inputs = frozenset({"teacher", "target"}), frozenset({"s"})
        return Needs(frozenset(roles), data=True, process="flow", inputs=inputs, frozen=frozen)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch))
        if self.target_decay is not None:
            follow(roles.target, roles.student, self.target_decay)

    def jumps(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Levels u (t, middle, s) of dyadic length 1/n, n a power of two below `finest`, on the grid of that length."""
        levels = self.finest.bit_length() - 1
        n = 2.0 ** draws.integers(max(levels, 1)).double()
        t = ((n * draws.uniform()).floor() + 1) / n
        return t, t - 0.5 / n, t - 1 / n

    def leg(self, net: Any, cond: Any, finest: Tensor) -> Leg:
        """The jumps of targets: where `finest` (b,) they are asked at s = t, which flow matching trains."""

        def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return ask(net, x, t, torch.where(finest, t, s), cond).at(s)

        return jump

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        student, process = roles.student, roles.student.process
        t, middle, s = self.jumps(batch.draws)
        boot = batch.draws.uniform() < self.bootstrap
        t = torch.where(boot, t, batch.draws.uniform())
        middle, s = torch.where(boot, middle, t), torch.where(boot, s, t)
        finest = t - middle < 1.5 / self.finest
        # Samples are drawn at even levels of the process, which lie unevenly in time where it is shifted.
        t, middle, s = (process.grid(u) for u in (t, middle, s))
        x0, eps = batch.data(), batch.noise()
        x, _ = add_noise(process, x0, eps, t)
        own = self.leg(student if self.target_decay is None else roles.target, batch.cond, finest)
        length = torch.where(boot, t - s, torch.ones_like(t))
        chord = (x - two_leg(own, own, x, t, middle, s)) / bc(length, x)
        with torch.no_grad():
            if self.source == "teacher":
                plain = Teacher(roles.teacher, batch, self.guidance)(x, t).velocity()
            else:
                plain = eps - x0
        target = torch.where(bc(boot.to(t.dtype), x) > 0, chord, plain)
        here = student(x, t, batch.cond, s=s).velocity()
        both = mse(here, target, torch.where(boot, 1.0, 0.0)), mse(here, target, torch.where(boot, 0.0, 1.0))
        yield Losses({"shortcut": both[0], "flow": both[1]})

    def sampler(self) -> Sampler:
        return Sampler(kind="map", steps=(1.0,), counts=self.counts)
