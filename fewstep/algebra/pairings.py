"""Curricula of consistency models: which two neighbouring times (t, u), u < t, a step compares."""

from __future__ import annotations

import math
from typing import Annotated, Protocol

import torch
from pydantic import PositiveInt
from torch import Tensor

from fewstep.algebra.draws import Draws
from fewstep.algebra.noising import angle_of
from fewstep.algebra.process import Process
from fewstep.algebra.times import LogNormal, TimesPart
from fewstep.config import Count, OneOf, part


class Pairing(Protocol):
    """Neighbouring times at a training step, process times float64 (b,) each, u < t."""

    def sample(self, draws: Draws, process: Process, step: int) -> tuple[Tensor, Tensor]: ...


PairingPart = Annotated[Pairing, OneOf("pairing")]


def _neighbours(k: Tensor, count: int, process: Process) -> tuple[Tensor, Tensor]:
    """Levels (k + 1) / (count - 1) and k / (count - 1) of a grid of `count` points."""
    return process.grid((k + 1).double() / (count - 1)), process.grid(k.double() / (count - 1))


@part("pairing", "grid")
class Grid:
    """A uniform index of a fixed grid: CD with 18 (CIFAR) or 40 (ImageNet-64) points, LCM with 51."""

    points: Count = 18
    """Points of the grid, both ends among them."""

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"points must be at least 2, not {self.points}")

    def sample(self, draws: Draws, process: Process, step: int) -> tuple[Tensor, Tensor]:
        return _neighbours(draws.integers(self.points - 1), self.points, process)


def ct_points(step: int, total: int, s0: int = 2, s1: int = 150) -> int:
    """N(k) of consistency training (arXiv 2303.01469, appendix C)."""
    return math.ceil(math.sqrt(step / total * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1


def ct_decay(points: int, s0: int = 2, mu0: float = 0.9) -> float:
    """mu(k) = exp(s0 ln mu0 / N) (arXiv 2303.01469, appendix C)."""
    return math.exp(s0 * math.log(mu0) / points)


@part("pairing", "ct")
class CTGrid:
    """Consistency training's growing grid, N(k) points (arXiv 2303.01469, appendix C)."""

    total: PositiveInt = 800_000
    """Steps over which the grid grows."""
    start: Count = 2
    """s0, points of the first grid (paper: 2)."""
    end: Count = 150
    """s1; the last grid has s1 + 1 points (CIFAR-10: 150)."""
    decay: float = 0.9
    """mu0, the target's EMA decay at a grid of `start` points (CIFAR-10 .9; ImageNet-64 and LSUN .95)."""

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must lie in (0, 1), not {self.decay}")

    def sample(self, draws: Draws, process: Process, step: int) -> tuple[Tensor, Tensor]:
        points = ct_points(min(step, self.total), self.total, self.start, self.end)
        return _neighbours(draws.integers(points - 1), points, process)


def ict_points(step: int, total: int, s0: int = 10, s1: int = 1280) -> int:
    """N(k) of iCT: doubles at equal intervals (arXiv 2310.14189, eq. 5)."""
    every = math.floor(total / (math.log2(s1 // s0) + 1))
    return min(s0 * 2 ** (step // every), s1) + 1


def ict_weights(process: Process, points: int, mean: float, std: float) -> Tensor:
    """Probability of index k, float64 (points - 1,): a lognormal of sigma / alpha between neighbours."""
    t = process.grid(torch.linspace(0, 1, points, dtype=torch.float64))
    log_ratio = torch.log(torch.tan(angle_of(process, t)).clamp(1e-12, 1e12))
    edges = torch.erf((log_ratio - mean) / (math.sqrt(2) * std))
    weights = (edges[1:] - edges[:-1]).clamp_min(0)
    return weights / weights.sum()


@part("pairing", "ict")
class ICTGrid:
    """iCT: a grid that doubles, its index drawn from a discretised lognormal (arXiv 2310.14189, sec. 3.4, 3.5)."""

    total: PositiveInt = 400_000
    """K, the training steps over which the grid doubles."""
    start: Count = 10
    """s0, intervals of the first grid."""
    end: PositiveInt = 1280
    """s1, intervals of the last grid."""
    mean: float = -1.1
    """Mean of ln(sigma / alpha), the paper's P_mean."""
    std: float = 2.0
    """Its standard deviation, the paper's P_std."""

    def sample(self, draws: Draws, process: Process, step: int) -> tuple[Tensor, Tensor]:
        points = ict_points(min(step, self.total), self.total, self.start, self.end)
        edges = ict_weights(process, points, self.mean, self.std).cumsum(0).to(draws.device)
        k = torch.searchsorted(edges, draws.uniform()).clamp_max(points - 2)
        return _neighbours(k, points, process)


def ect_ratio(stage: int, q: float = 2.0, cap: float = 0.999) -> float:
    """rho = min(1 - q^-(stage + 1), cap): how close the two times are (ECT, arXiv 2406.14548)."""
    return min(1 - q ** -(stage + 1), cap)


def ect_lower(sigma: Tensor, ratio: float) -> Tensor:
    """r = sigma - sigma (1 - rho)(1 + 8 sigmoid(-sigma)), at least 0."""
    return (sigma - sigma * (1 - ratio) * (1 + 8 * torch.sigmoid(-sigma))).clamp_min(0)


@part("pairing", "ect")
class ECTPairs:
    """ECT: t from a distribution, u = r(t) closing in on it stage by stage, on sigma / alpha (arXiv 2406.14548)."""

    times: TimesPart = LogNormal(mean=-1.1, std=2.0)
    """Distribution of t; ECT takes iCT's lognormal."""
    stage_steps: PositiveInt = 12_500
    """Steps of one stage; the gap shrinks by q from one to the next."""
    q: float = 2.0
    """Factor by which the gap 1 - rho shrinks from one stage to the next."""
    cap: float = 0.999
    """Largest rho, where the two times are nearest."""
    first: int = 0
    """Stage to start at; higher ones suit a student that starts as the teacher."""

    def __post_init__(self) -> None:
        if self.q <= 1 or not 0 < self.cap < 1 or self.first < 0:
            raise ValueError(f"need q > 1, 0 < cap < 1, first >= 0, not {self.q}, {self.cap}, {self.first}")

    def sample(self, draws: Draws, process: Process, step: int) -> tuple[Tensor, Tensor]:
        t = self.times.sample(draws, process).clamp_min(1e-3)
        return t, self.lower(process, t, step)

    def lower(self, process: Process, t: Tensor, step: int) -> Tensor:
        """u = r(t) < t, process times (b,); the clean end stands at sigma = 0, also where a process ends above it."""
        ratio = ect_ratio(self.first + step // self.stage_steps, self.q, self.cap)
        lower = ect_lower(torch.tan(angle_of(process, t)).clamp_max(1e6), ratio)
        u = process.t_of_angle(torch.atan(lower))
        # EDM has no time below sigma_min: a neighbour there is the clean sample, as r = 0 is.
        end = torch.tan(angle_of(process, process.grid(torch.zeros_like(t))))
        return torch.where((lower <= end) | (u >= t), torch.zeros_like(t), u)
