"""Noising processes x_t = alpha(t) x0 + sigma(t) eps.

Time grows with noise. Times are tensors of shape (b,) or (b, *f), float32 or float64; every schedule function keeps their
shape and dtype. Processes compare through the angle atan2(sigma, alpha), finite at sigma = 0 and at alpha = 0 too.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.algebra.tables import check_betas, log_ratio_table
from fewstep.config import Bounded, Count, NotNegative, OneOf, Positive, Proper, part


def bc(c: Tensor, x: Tensor) -> Tensor:
    """Give a coefficient of shape (b, *f) the rank of x (b, *f, ...) and a dtype fit to multiply it.

    The dtype is x's, except that half precision is computed in float32. Raises ValueError when the leading
    axes disagree, so that a batch never broadcasts against a spatial axis by accident.
    """
    if c.ndim and c.shape != x.shape[: c.ndim]:
        raise ValueError(f"times of shape {tuple(c.shape)} do not lead the shape {tuple(x.shape)} of x")
    dtype = torch.promote_types(x.dtype, torch.float32)
    return c.to(x.device, dtype).reshape(c.shape + (1,) * (x.ndim - c.ndim))


@runtime_checkable
class Process(Protocol):
    """A linear-Gaussian noising process; all arguments and results are tensors of the shape of t."""

    @property
    def t_max(self) -> float: ...
    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def dalpha(self, t: Tensor) -> Tensor: ...
    def dsigma(self, t: Tensor) -> Tensor: ...
    def grid(self, u: Tensor) -> Tensor:
        """Process time of the method time u in [0, 1]; u = 1 is t_max."""
        ...

    def level(self, t: Tensor) -> Tensor:
        """The method time of process time t: the inverse of `grid`."""
        ...

    def t_of_angle(self, angle: Tensor) -> Tensor:
        """Time at which atan2(sigma, alpha) equals `angle`, clamped to the process's range."""
        ...

    def prior(self, noise: Tensor, t: Tensor) -> Tensor:
        """What a sampler starts from at time t: pure noise at the scale the process has there."""
        ...


ProcessPart = Annotated[Process, OneOf("process")]


class _VariancePreserving:
    """alpha = cos(angle), sigma = sin(angle): subclasses give the angle, its derivative and its inverse."""

    t_max = 1.0

    def angle(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def dangle(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self.angle(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self.angle(t))

    def dalpha(self, t: Tensor) -> Tensor:
        return -torch.sin(self.angle(t)) * self.dangle(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.cos(self.angle(t)) * self.dangle(t)

    def prior(self, noise: Tensor, t: Tensor) -> Tensor:
        return noise


@part("process", "flow")
class Flow:
    """Rectified flow: alpha = 1 - t, sigma = t, t in [0, 1] (arXiv 2209.03003).

    >>> t = torch.tensor([0.25])
    >>> fewstep.Flow().alpha(t), fewstep.Flow().sigma(t)
    (tensor([0.7500]), tensor([0.2500]))
    """

    t_max = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def dalpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def grid(self, u: Tensor) -> Tensor:
        return u

    def level(self, t: Tensor) -> Tensor:
        return t

    def t_of_angle(self, angle: Tensor) -> Tensor:
        s, c = torch.sin(angle), torch.cos(angle)
        return (s / (s + c)).clamp(0, 1)

    def prior(self, noise: Tensor, t: Tensor) -> Tensor:
        return noise


@part("process", "shifted_flow")
class ShiftedFlow(Flow):
    """Flow whose levels u are spaced as the sampler of SD3, Flux or SANA does: t = s u / (1 + (s - 1) u).

    Only the spacing differs, alpha and sigma are Flow's. A dynamic shift exp(mu) is this one at a fixed size. Every
    level of a recipe goes through it: a `shift` of its `times` comes on top.

    >>> fewstep.ShiftedFlow(shift=3.0).grid(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.0000, 0.7500, 1.0000])
    """

    shift: Positive = 3.0
    """s: SD3 and SANA 3; Flux exp(0.5) at 256 tokens to exp(1.15) at 4096 (arXiv 2403.03206, eq. 23)."""

    def grid(self, u: Tensor) -> Tensor:
        return self.shift * u / (1 + (self.shift - 1) * u)

    def level(self, t: Tensor) -> Tensor:
        return t / (self.shift - (self.shift - 1) * t)


@part("process", "edm")
class EDM:
    """Variance exploding with t = sigma in [sigma_min, sigma_max] (arXiv 2206.00364).

    >>> fewstep.EDM(sigma_max=80.0).grid(torch.tensor([1.0, 0.0]))  # the method time u becomes sigma
    tensor([8.0000e+01, 2.0000e-03])
    """

    sigma_min: NotNegative = 0.002
    """Smallest noise level; samples at it count as clean."""
    sigma_max: Positive = 80.0
    """Largest noise level, at which sampling starts."""
    rho: Positive = 7.0
    """Exponent of the Karras grid (eq. 5)."""
    sigma_data: Positive = 0.5
    """Standard deviation of the data, used by the preconditioning (table 1)."""

    def __post_init__(self) -> None:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min must be smaller than sigma_max, not {self.sigma_min} and {self.sigma_max}")

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def grid(self, u: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        # Both ends are set exactly: the power of a root is off by an ulp, and exported schedules compare them.
        t = (low + u * (high - low)) ** self.rho
        return torch.where(u >= 1, self.sigma_max, torch.where(u <= 0, self.sigma_min, t)).to(u.dtype)

    def level(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((t.clamp_min(0) ** (1 / self.rho) - low) / (high - low)).clamp(0, 1)

    def t_of_angle(self, angle: Tensor) -> Tensor:
        high = math.atan2(self.sigma_max, 1.0)
        return torch.tan(angle.clamp(0, high)).clamp(self.sigma_min, self.sigma_max)

    def prior(self, noise: Tensor, t: Tensor) -> Tensor:
        return bc(t, noise) * noise


@part("process", "trig")
class Trig(_VariancePreserving):
    """TrigFlow: alpha = cos t, sigma = sin t, t in [0, pi/2], on data divided by sigma_data (arXiv 2410.11081).

    >>> process = fewstep.Trig()
    >>> t = process.grid(torch.tensor([0.0, 1.0]))
    >>> process.alpha(t), process.sigma(t)
    (tensor([1., 0.]), tensor([0., 1.]))
    """

    t_max = math.pi / 2

    # cos of the floating-point quarter turn is 6e-17; this form is 0 there and keeps the slope -1 for tangents.
    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 - t)

    def angle(self, t: Tensor) -> Tensor:
        return t

    def dangle(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def grid(self, u: Tensor) -> Tensor:
        return u * (math.pi / 2)

    def level(self, t: Tensor) -> Tensor:
        return t / (math.pi / 2)

    def t_of_angle(self, angle: Tensor) -> Tensor:
        return angle.clamp(0, math.pi / 2)


@part("process", "cosine")
class Cosine(_VariancePreserving):
    """Cosine schedule with logSNR = -2 log tan(a u + b) between two limits (arXiv 2202.00512, sec. 3).

    >>> process, t = fewstep.Cosine(), torch.tensor([0.5])
    >>> process.alpha(t), process.sigma(t)
    (tensor([0.7071]), tensor([0.7071]))
    """

    logsnr_min: Bounded = -20.0
    """ln(alpha^2 / sigma^2) at t = 1, the noisy end."""
    logsnr_max: Bounded = 20.0
    """ln(alpha^2 / sigma^2) at t = 0, the clean end."""

    def __post_init__(self) -> None:
        if self.logsnr_min >= self.logsnr_max:
            raise ValueError(f"logsnr_min must be below logsnr_max, not {self.logsnr_min} and {self.logsnr_max}")

    @property
    def _ends(self) -> tuple[float, float]:
        return math.atan(math.exp(-self.logsnr_max / 2)), math.atan(math.exp(-self.logsnr_min / 2))

    def angle(self, t: Tensor) -> Tensor:
        low, high = self._ends
        return low + t * (high - low)

    def dangle(self, t: Tensor) -> Tensor:
        low, high = self._ends
        return torch.full_like(t, high - low)

    def grid(self, u: Tensor) -> Tensor:
        return u

    def level(self, t: Tensor) -> Tensor:
        return t

    def t_of_angle(self, angle: Tensor) -> Tensor:
        low, high = self._ends
        return ((angle - low) / (high - low)).clamp(0, 1)


@part("process", "vp")
class VP(_VariancePreserving):
    """Continuous variance preserving diffusion, beta linear in t in (0, 1] (arXiv 2011.13456, eq. 33).

    >>> process, t = fewstep.VP(), torch.tensor([0.3])
    >>> process.alpha(t) ** 2 + process.sigma(t) ** 2
    tensor([1.])
    """

    beta_min: NotNegative = 0.1
    """beta at t = 0 (the paper's .1)."""
    beta_delta: Positive = 19.9
    """beta at t = 1 less beta at t = 0 (the paper's 20 - .1)."""

    def _b(self, t: Tensor) -> Tensor:
        return 0.5 * self.beta_delta * t**2 + self.beta_min * t

    def angle(self, t: Tensor) -> Tensor:
        # tan^2 = (1 - e^-B) / e^-B = e^B - 1; expm1 keeps the digits near t = 0.
        return torch.atan(torch.sqrt(torch.expm1(self._b(t))))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._b(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._b(t)))

    def _rate(self, t: Tensor) -> Tensor:
        return self.beta_delta * t + self.beta_min

    def dalpha(self, t: Tensor) -> Tensor:
        return -0.5 * self._rate(t) * self.alpha(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return 0.5 * self._rate(t) * self.alpha(t) ** 2 / self.sigma(t)

    def grid(self, u: Tensor) -> Tensor:
        return u

    def level(self, t: Tensor) -> Tensor:
        return t

    def t_of_angle(self, angle: Tensor) -> Tensor:
        b = -2 * torch.log(torch.cos(angle).clamp_min(1e-30))
        t = (torch.sqrt(self.beta_min**2 + 2 * self.beta_delta * b) - self.beta_min) / self.beta_delta
        return t.clamp(0, 1)


@part("process", "discrete_vp")
class DiscreteVP(_VariancePreserving):
    """The DDPM tables as a continuous process: t = index + 1, so that t = 0 is clean and t = `steps` the end.

    Between two indices log(sigma / alpha) is interpolated linearly; below the first index the ratio itself
    falls linearly to 0 (arXiv 2006.11239; scaled-linear: arXiv 2112.10752).

    >>> sd = fewstep.DiscreteVP(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    >>> sd.sigma(torch.tensor([1000.0])) / sd.alpha(torch.tensor([1000.0]))  # Stable Diffusion's noisiest level
    tensor([14.6146])
    """

    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """What runs linearly from start to end: beta itself (DDPM), or its root (Stable Diffusion); or a cosine without."""
    beta_start: Proper = 1e-4
    """beta of the first index (DDPM 1e-4; Stable Diffusion .00085)."""
    beta_end: Proper = 0.02
    """beta of the last index (DDPM .02; Stable Diffusion .012)."""
    steps: Count = 1000
    """Length of the table."""
    zero_snr: bool = False
    """The last index is pure noise (zero terminal SNR, arXiv 2305.08891): v-prediction fine-tunes of SDXL."""
    snr_shift: Positive = 1.0
    """What alpha^2 / sigma^2 of the table is divided by (CogVideoX 3)."""
    betas: tuple[float, ...] | None = None
    """The table itself, of `steps` values, in place of a schedule."""

    def __post_init__(self) -> None:
        if self.betas is not None:
            check_betas(self.betas, self.steps)

    @property
    def table(self) -> Tensor:
        """log(sigma / alpha) of every index, float64 (steps,)."""
        more = (self.zero_snr, self.snr_shift, self.betas)
        return log_ratio_table(self.schedule, self.beta_start, self.beta_end, self.steps, *more)

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return float(self.steps)

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log(sigma/alpha) and its slope in t, for t >= 1."""
        table = self.table.to(t)
        k = (t - 1).floor().clamp(0, self.steps - 2).long()
        slope = table[k + 1] - table[k]
        return table[k] + slope * (t - 1 - k), slope

    def angle(self, t: Tensor) -> Tensor:
        log_ratio, _ = self._segment(t)
        first = self.table.to(t)[0].exp()
        return torch.atan(torch.where(t < 1, first * t.clamp_min(0), log_ratio.exp()))

    def dangle(self, t: Tensor) -> Tensor:
        _, slope = self._segment(t)
        angle = self.angle(t)
        first = self.table.to(t)[0].exp()
        return torch.where(t < 1, first * torch.cos(angle) ** 2, slope * torch.sin(angle) * torch.cos(angle))

    def grid(self, u: Tensor) -> Tensor:
        return u * self.steps

    def level(self, t: Tensor) -> Tensor:
        return t / self.steps

    def t_of_angle(self, angle: Tensor) -> Tensor:
        table = self.table.to(angle)
        ratio = torch.tan(angle.clamp(0, math.atan(math.exp(float(table[-1])))))
        log_ratio = torch.log(ratio.clamp_min(1e-30)).contiguous()
        k = (torch.searchsorted(table, log_ratio) - 1).clamp(0, self.steps - 2)
        above = 1 + k + (log_ratio - table[k]) / (table[k + 1] - table[k])
        return torch.where(ratio < table[0].exp(), ratio / table[0].exp(), above).clamp(0, self.steps)

    def clean_first_betas(self) -> list[float]:
        """The table's betas with index 0 made clean and its share moved into index 1; later levels are as before."""
        bar = torch.sigmoid(-2 * self.table)
        return [0.0, float(1 - bar[1]), *(1 - bar[2:] / bar[1:-1]).tolist()]
