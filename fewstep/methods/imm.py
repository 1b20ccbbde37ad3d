"""IMM: Inductive Moment Matching (arXiv 2503.07565)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.noising import add_noise, angle_of
from fewstep.algebra.process import Process
from fewstep.algebra.sampling import Sampler, any_steps
from fewstep.algebra.times import TimesPart, Uniform, check_steps
from fewstep.config import Count, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.terms import dropped
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import between, student_leg


def mmd2(x: Tensor, y: Tensor, kind: Literal["laplace", "l2"], scale: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of groups x, y (g, m, d), diagonals included; (g,).

    laplace: exp(-scale max(|a - b|, 1e-8) / d); l2: -|a - b|^2, whose MMD is twice the squared distance of means.
    """
    d = x.shape[-1]

    def k(a: Tensor, b: Tensor) -> Tensor:
        squared = ((a[:, :, None] - b[:, None]) ** 2).sum(-1)
        if kind == "l2":
            return -squared
        return torch.exp(-scale[:, None, None] * torch.sqrt(squared.clamp_min(1e-16)) / d)

    return (k(x, x) + k(y, y) - 2 * k(x, y)).mean((1, 2))


@part("method", "imm")
class IMM:
    """Jumps t -> s and u -> s of particles that share (t, u, s) have the same distribution; no teacher."""

    cites: ClassVar[tuple[str, ...]] = ("2503.07565",)

    particles: Count = 4
    """M, rows that share their times; must divide the micro-batch."""
    times: TimesPart = Uniform(low=0.0, high=0.994)
    """t; the paper stops at .994 for flow."""
    k: float = 12.0
    """u = max(s, eta^-1(eta(t) - eta_max / 2^k)) with eta = sigma / alpha (ImageNet 12, CIFAR-10 15)."""
    eta_max: float = 0.994 / 0.006
    """eta at the largest t (CIFAR-10: 160)."""
    gap: float = 1e-4
    """t - u is at least this, s permitting: at large t the eta rule alone goes below what half precision resolves."""
    kernel: Literal["laplace", "l2"] = "laplace"
    """laplace (paper); l2 with one particle is consistency training."""
    weight: Literal["paper", "one"] = "paper"
    """paper: sigmoid(b - lambda) (-dlambda/dt) alpha^a / (alpha^2 + sigma^2) / 2 with the full logSNR lambda."""
    a: int = 2
    """ImageNet, in flow: 2; CIFAR-10: 1."""
    b: float = 4.0
    """ImageNet, in flow: 4; CIFAR-10: 5."""
    clean_end: bool = False
    """True: always s = 0."""
    drop_cond: float = 0.1
    """Share of rows trained without their condition (official .1)."""
    steps: tuple[float, ...] = (0.994,)
    """Levels; sampling starts where t ends in training."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.eta_max <= 0 or self.gap < 0 or not 0 <= self.drop_cond <= 1:
            raise ValueError(
                f"need eta_max > 0, gap >= 0 and drop_cond in [0, 1], not {self.eta_max}, {self.gap}, {self.drop_cond}"
            )

    def needs(self) -> Needs:
        return Needs(frozenset({"student"}), data=True, process="flow")

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch))

    def shared(self, values: Tensor) -> Tensor:
        """The first of every `particles` rows for all of them."""
        if len(values) % self.particles:
            raise ValueError(f"particles {self.particles} must divide the micro-batch of {len(values)}")
        return values[:: self.particles].repeat_interleave(self.particles)

    def triple(self, batch: Batch, process: Process) -> tuple[Tensor, Tensor, Tensor]:
        """(t, u, s), each shared by a group of particles."""
        t = self.shared(self.times.sample(batch.draws, process)).clamp_min(1e-3)
        s = torch.zeros_like(t) if self.clean_end else self.shared(between(batch.draws, 0 * t, t))
        eta = torch.tan(angle_of(process, t)) - self.eta_max / 2**self.k
        u = torch.minimum(process.t_of_angle(torch.atan(eta.clamp_min(0))), t - self.gap)
        return t, torch.maximum(s, u), s

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        process = roles.student.process
        t, u, s = self.triple(batch, process)
        x0, eps = batch.data(), batch.noise()
        x_t, x_u = (add_noise(process, x0, eps, time)[0] for time in (t, u))
        own = student_leg(roles.student, dropped(batch, self.drop_cond))
        with torch.no_grad():
            there = own(x_u, u, s)
        here = own(x_t, t, s)
        groups, first = (len(batch) // self.particles, self.particles, -1), slice(None, None, self.particles)
        scale = 1 / (t - s)[first].clamp_min(1e-3).to(here.dtype)
        gap = mmd2(here.reshape(groups), there.reshape(groups), self.kernel, scale)
        yield Losses({"mmd": (gap * self.weights(process, t[first]).to(gap.dtype)).mean()})

    def weights(self, process: Process, t: Tensor) -> Tensor:
        """Loss weight (g,)."""
        if self.weight == "one":
            return torch.ones_like(t)
        alpha, sigma = process.alpha(t), process.sigma(t)
        log_snr = 2 * torch.log(alpha / sigma)
        slope = 2 * (process.dalpha(t) / alpha - process.dsigma(t) / sigma)
        return -0.5 * torch.sigmoid(self.b - log_snr) * slope * alpha**self.a / (alpha**2 + sigma**2)

    def sampler(self) -> Sampler:
        return Sampler(kind="map", steps=self.steps, counts=any_steps(self.steps))
