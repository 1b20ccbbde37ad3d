"""Distributions of noise levels. Methods speak of u in [0, 1]; a distribution returns process times.

u is mapped by `Process.grid` (Karras for EDM, table index for VP, t for flow). Distributions that papers define
on sigma / alpha are placed by matching the angle atan2(sigma, alpha), so they mean the same in every process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Protocol

import torch
from annotated_types import Ge, Le
from torch import Tensor

from fewstep.algebra.draws import Draws
from fewstep.algebra.process import DiscreteVP, Process
from fewstep.config import Bounded, OneOf, Positive, config, part


class TimeDist(Protocol):
    """A distribution of noise levels."""

    def sample(self, draws: Draws, process: Process, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Process times, float64 (b,); `span` squeezes u linearly into a part of [0, 1]."""
        ...


TimesPart = Annotated[TimeDist, OneOf("times")]


def shift(u: Tensor, factor: float | Tensor) -> Tensor:
    """S_s(u) = s u / (1 + (s - 1) u), the time shift of flow models (arXiv 2403.03206, eq. 23)."""
    return factor * u / (1 + (factor - 1) * u)


def _place(u: Tensor, process: Process, span: tuple[float, float]) -> Tensor:
    low, high = span
    return process.grid(low + u * (high - low))


def _at_ratio(log_ratio: Tensor, process: Process) -> Tensor:
    return process.t_of_angle(torch.atan(torch.exp(log_ratio)))


def standard_normal(draws: Draws) -> Tensor:
    """float64 (b,) standard normal numbers by the inverse distribution function of one uniform each."""
    return torch.special.ndtri(draws.uniform())


@part("times", "uniform")
class Uniform:
    """u ~ U(low, high), then the flow shift. DMD2 re-noises with (0.02, 0.98) (arXiv 2405.14867)."""

    low: float = 0.02
    """Smallest u, before the shift."""
    high: float = 0.98
    """Largest u, before the shift."""
    shift: Positive = 1.0
    """s of the flow shift s u / (1 + (s - 1) u); 1 is none, above it levels are noisier (arXiv 2403.03206, eq. 23)."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low and high must satisfy 0 <= low < high <= 1, not {self.low}, {self.high}")
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, not {self.shift}")

    def sample(self, draws: Draws, process: Process, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        u = shift(self.low + (self.high - self.low) * draws.uniform(), self.shift)
        return _place(u, process, span)


@part("times", "index")
class Index:
    """A uniform integer index of an N-point grid, low..high inclusive (DMD2: 20..980 of 0..999).

    Index k stands at level k / (N - 1), from the clean end to the prior (Karras: sigma_min to sigma_max); on a DDPM
    table it is the table's own index, at level (k + 1) / N, where index 0 is noisy already.
    """

    low: int = 20
    """Smallest index that is drawn."""
    high: int = 980
    """Largest index that is drawn."""
    count: int = 1000
    """N, length of the grid or table."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high < self.count or self.count < 2:
            raise ValueError(f"need 0 <= low <= high < count and count >= 2, not {self.low}, {self.high}, {self.count}")

    def sample(self, draws: Draws, process: Process, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        k = (self.low + draws.integers(self.high - self.low + 1)).double()
        on_table = isinstance(process, DiscreteVP)
        return _place((k + 1) / self.count if on_table else k / (self.count - 1), process, span)


@part("times", "lognormal")
class LogNormal:
    """ln(sigma / alpha) ~ N(mean, std^2): EDM (-1.2, 1.2), iCT (-1.1, 2.0), sCM (-1.0, 1.4) (per paper)."""

    mean: Bounded = -1.2
    """Mean of ln(sigma / alpha)."""
    std: Positive = 1.2
    """Standard deviation of ln(sigma / alpha)."""

    def sample(self, draws: Draws, process: Process, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        if span != (0.0, 1.0):
            raise ValueError("times: lognormal lives on sigma, it has no span; use uniform or logit_normal")
        return _at_ratio(self.mean + self.std * standard_normal(draws), process)


@part("times", "trig_lognormal")
class TrigLogNormal:
    """TrigFlow angle atan(e^tau / sigma_data), tau ~ N(mean, std^2) (sCM, arXiv 2410.11081, sec. 4)."""

    mean: Bounded = -1.0
    """Mean of tau."""
    std: Positive = 1.4
    """Standard deviation of tau."""
    sigma_data: Positive = 0.5
    """Standard deviation of the data that the angle is measured with (sCM .5; 1 for data scaled to 1)."""

    def sample(self, draws: Draws, process: Process, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        if span != (0.0, 1.0):
            raise ValueError("times: trig_lognormal lives on sigma, it has no span; use uniform or logit_normal")
        tau = self.mean + self.std * standard_normal(draws)
        return _at_ratio(tau - math.log(self.sigma_data), process)


@lru_cache(maxsize=8)
def _student_t_table(mean: float, std: float, df: float, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(log sigma/alpha, probability below it), float64 (n,), of the truncated distribution by the trapezoid rule."""
    # Dense where the density is narrow: the distance from the mode is spaced as sinh.
    reach = max(abs(math.log(low) - mean), abs(math.log(high) - mean)) / std
    z = torch.sinh(torch.linspace(-1, 1, 20_001, dtype=torch.float64) * math.asinh(reach))
    x = (mean + std * z).clamp(math.log(low), math.log(high))
    density = (1 + ((x - mean) / std) ** 2 / df) ** (-(df + 1) / 2)
    below = torch.cumsum((x[1:] - x[:-1]) * (density[1:] + density[:-1]) / 2, 0)
    below = torch.cat((torch.zeros(1, dtype=torch.float64), below))
    return x, below / below[-1]


@part("times", "log_student_t")
class LogStudentT:
    """ln(sigma / alpha) of a Student-t law, truncated: TCM's heavy tail above its boundary (arXiv 2410.14895).

    The paper's values for CIFAR-10: location 0, scale .2, .01 degrees of freedom, sigma in [1, 80].
    """

    mean: Bounded = 0.0
    """Location of ln(sigma / alpha)."""
    std: Positive = 0.2
    """Scale of ln(sigma / alpha)."""
    df: Positive = 0.01
    """Degrees of freedom."""
    low: float = 1.0
    """Smallest sigma / alpha."""
    high: Positive = 80.0
    """Largest sigma / alpha."""

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high or min(self.std, self.df) <= 0:
            raise ValueError(f"need 0 < low < high and std, df > 0, not {self.low}, {self.high}, {self.std}, {self.df}")

    def sample(self, draws: Draws, process: Process, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        if span != (0.0, 1.0):
            raise ValueError("times: log_student_t lives on sigma, it has no span; use uniform or logit_normal")
        x, below = _student_t_table(self.mean, self.std, self.df, self.low, self.high)
        p = draws.uniform()
        x, below = x.to(p.device), below.to(p.device)
        k = torch.searchsorted(below, p).clamp(1, len(x) - 1)
        share = (p - below[k - 1]) / (below[k] - below[k - 1]).clamp_min(1e-300)
        return _at_ratio(x[k - 1] + share * (x[k] - x[k - 1]), process)


@part("times", "logit_normal")
class LogitNormal:
    """u = sigmoid(N(mean, std^2)), then the flow shift (SD3 (0, 1); MeanFlow (-0.4, 1))."""

    mean: Bounded = 0.0
    """Mean of the logit of u."""
    std: Positive = 1.0
    """Standard deviation of the logit of u."""
    shift: Positive = 1.0
    """s of the flow shift s u / (1 + (s - 1) u); 1 is none."""

    def sample(self, draws: Draws, process: Process, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        u = shift(torch.sigmoid(self.mean + self.std * standard_normal(draws)), self.shift)
        return _place(u, process, span)


@part("times", "half_lognormal")
class HalfLogNormal:
    """Half of the rows from `lognormal`, half uniform in u above `low`: CTM's denoising times (arXiv 2310.02279)."""

    mean: Bounded = -1.2
    """Mean of ln(sigma / alpha) in the lognormal half."""
    std: Positive = 1.2
    """Its standard deviation."""
    low: float = 0.3
    """Smallest level of the uniform half (official: the noisiest .7 of the Karras grid)."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < 1:
            raise ValueError(f"low must lie in [0, 1), not {self.low}")

    def sample(self, draws: Draws, process: Process, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        if span != (0.0, 1.0):
            raise ValueError("times: half_lognormal lives on sigma, it has no span; use uniform or logit_normal")
        heads, place = draws.uniform(), draws.uniform()
        log_ratio = self.mean + self.std * torch.special.ndtri(place)
        flat = process.grid(self.low + (1 - self.low) * place)
        return torch.where(heads < 0.5, _at_ratio(log_ratio, process), flat)


@part("times", "sid")
class SiDTimes:
    """The SiD map: u ~ U(0, t_max/1000) on the Karras grid, sigma in [sigma_min, 24.4] (arXiv 2404.04057)."""

    t_max: Annotated[int, Ge(1), Le(1000)] = 800
    """Top of the 1000-point grid in use; the official 800 leaves the noisiest fifth out."""

    def sample(self, draws: Draws, process: Process, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        return _place(draws.uniform() * (self.t_max / 1000), process, span)


@part("times", "beta")
class Beta:
    """u ~ Beta(a, b) by the inverse of the Kumaraswamy form when one parameter is 1, which covers TwinFlow's (1, 1)."""

    a: Positive = 1.0
    """First parameter; above 1 it moves u to the noise."""
    b: Positive = 1.0
    """Second parameter; above 1 it moves u to the data."""

    def __post_init__(self) -> None:
        if self.a <= 0 or self.b <= 0 or (self.a != 1 and self.b != 1):
            raise ValueError(f"a and b must be positive and one of them 1, not {self.a}, {self.b}")

    def sample(self, draws: Draws, process: Process, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        p = draws.uniform()
        u = p ** (1 / self.a) if self.b == 1 else 1 - (1 - p) ** (1 / self.b)
        return _place(u, process, span)


@config
class Fading:
    """A factor that falls from `start` to 0 over so many student updates of a stage, by half a cosine (DMDR)."""

    start: Positive = 0.75
    """Its value at the first update."""
    over: int = 10_000
    """Student updates after which it is 0 (arXiv 2511.13649: 10,000)."""

    def __post_init__(self) -> None:
        if self.over < 1:
            raise ValueError(f"over must be at least 1, not {self.over}")

    def at(self, step: int) -> float:
        """Its value after `step` updates."""
        return self.start * (1 + math.cos(math.pi * min(step / self.over, 1.0))) / 2


@part("times", "fading_beta")
class FadingBeta:
    """DMDR's re-noise curriculum: u ~ Beta(a, b) whose parameters go from `start` to (1, 1), noisy levels first."""

    start: tuple[Positive, Positive] = (4.0, 1.5)
    """(a, b) at the first update (arXiv 2511.13649)."""
    over: int = 10_000
    """Student updates after which u is uniform."""

    def __post_init__(self) -> None:
        if self.over < 1:
            raise ValueError(f"over must be at least 1, not {self.over}")

    def staged(self, step: int) -> GeneralBeta:
        """The law after so many updates of the stage."""
        share = Fading(start=1.0, over=self.over).at(step)
        return GeneralBeta(*(1 + share * (v - 1) for v in self.start))

    def sample(self, draws: Draws, process: Process, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Of a law that changes there is none to sample; ValueError. `staged` has it."""
        raise ValueError("times: fading_beta changes with the step; it is for levels that are drawn knowing the step")


@dataclass(frozen=True)
class GeneralBeta:
    """u ~ Beta(a, b) by its inverse distribution function on a grid, one uniform number each."""

    a: float
    b: float

    def sample(self, draws: Draws, process: Process, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        u, below = _beta_table(self.a, self.b)
        u, below = u.to(draws.device), below.to(draws.device)
        p = draws.uniform()
        k = torch.searchsorted(below, p).clamp(1, len(below) - 1)
        share = (p - below[k - 1]) / (below[k] - below[k - 1]).clamp_min(1e-300)
        return _place(u[k - 1] + share * (u[k] - u[k - 1]), process, span)


@lru_cache(maxsize=8)
def _beta_table(a: float, b: float) -> tuple[Tensor, Tensor]:
    """(u, probability below it), float64 (n,)."""
    # Dense at both ends, where a density is steep.
    u = torch.sin(torch.linspace(0, math.pi / 2, 4097, dtype=torch.float64)) ** 2
    middle = (u[1:] + u[:-1]) / 2
    mass = middle ** (a - 1) * (1 - middle) ** (b - 1) * (u[1:] - u[:-1])
    below = torch.cat((torch.zeros(1, dtype=torch.float64), torch.cumsum(mass, 0)))
    return u, below / below[-1]


def law_at(times: TimeDist, step: int) -> TimeDist:
    """The distribution of noise levels after so many updates of a stage: most do not change."""
    return times.staged(step) if isinstance(times, FadingBeta) else times


@part("times", "levels")
class Levels:
    """One of a list of levels u, with equal probability (DDIM grids, step lists)."""

    at: tuple[float, ...]
    """The levels, in [0, 1]."""

    def __post_init__(self) -> None:
        if not self.at or not all(0 <= u <= 1 for u in self.at):
            raise ValueError(f"at must hold levels in [0, 1], not {self.at}")

    def sample(self, draws: Draws, process: Process, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        levels = torch.tensor(self.at, dtype=torch.float64, device=draws.device)
        return _place(levels[draws.integers(len(self.at))], process, span)


def ddim_levels(count: int, table: int = 1000) -> tuple[float, ...]:
    """The `count` DDIM knots {step i - 1} of a table, as levels u of a DiscreteVP process (t = index + 1)."""
    step = table // count
    return tuple((step * (i + 1)) / table for i in range(count))


def check_steps(steps: tuple[float, ...]) -> tuple[float, ...]:
    """A student's step list: levels u in (0, 1], strictly decreasing. Raises ValueError otherwise."""
    if not steps:
        raise ValueError("steps is empty; give at least one level, such as [1.0]")
    if any(not 0 < u <= 1 for u in steps):
        raise ValueError(f"steps {list(steps)} must lie in (0, 1], the levels of the process grid")
    if any(a <= b for a, b in pairwise(steps)):
        raise ValueError(f"steps {list(steps)} must decrease strictly: the first level is the noisiest")
    return steps


def check_step_lists(steps: tuple[float, ...], lists: tuple[tuple[float, ...], ...]) -> None:
    """Lists of steps for one student: each as `check_steps` has it, of a length of its own, and `steps` one of them."""
    check_steps(steps)
    for i, one in enumerate(lists):
        try:
            check_steps(one)
        except ValueError as error:
            raise ValueError(f"step_lists.{i}: {error}") from None
    lengths = [len(one) for one in lists]
    if len(lists) == 1:
        raise ValueError("step_lists: one list is what `steps` is for; give several, or leave it out")
    if twice := next((n for n in lengths if lengths.count(n) > 1), None):
        raise ValueError(
            f"step_lists: two lists have {twice} step{'s' * (twice > 1)}, and `--steps {twice}` could mean either; give "
            "one of each length"
        )
    if lists and steps not in lists:
        raise ValueError(
            f"step_lists: none is steps, {list(steps)}, at which it is sampled where nothing else is asked; add it, or "
            "give one of them as steps"
        )
