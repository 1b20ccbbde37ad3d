"""A network as a denoiser: the border at which parametrisation, input scale and time input are converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.prediction import PAIRS, Prediction, from_raw, from_x0
from fewstep.process import EDM, Process, angle_of, bc

TimeInput = Literal["t", "1000t", "index", "angle", "log_sigma/4", "250log_sigma"]

_TIME: dict[str, Callable[[Process, Tensor], Tensor]] = {
    "t": lambda p, t: t,
    "1000t": lambda p, t: 1000 * t,
    # DiscreteVP counts from the clean end: t = index + 1.
    "index": lambda p, t: t - 1,
    "angle": angle_of,
    "log_sigma/4": lambda p, t: 0.25 * torch.log(p.sigma(t)),
    "250log_sigma": lambda p, t: 250 * torch.log(p.sigma(t) + 1e-44),
}


class Denoiser(nn.Module):
    """Calls a network as `denoiser(x, t, cond) -> Prediction`.

    Args:
        net: called as net(x_scaled, time, cond, taps=..., stop=...), returns (raw, features). With stop=True
            it may return (None, features) as soon as all taps are known.
        process: the process whose times t are.
        prediction: what net returns, a key of `fewstep.prediction.PAIRS`.
        time_input: what net takes as its time.
    """

    def __init__(self, net: nn.Module, process: Process, prediction: str, time_input: TimeInput) -> None:
        super().__init__()
        if prediction not in PAIRS:
            raise ValueError(f"prediction {prediction!r} is not one of {', '.join(PAIRS)}")
        if time_input not in _TIME:
            raise ValueError(f"time_input {time_input!r} is not one of {', '.join(_TIME)}")
        self.net = net
        self.process = process
        self.prediction = prediction
        self.time_input = time_input

    def _inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.prediction in ("edm", "cm"):
            assert isinstance(self.process, EDM)
            c_in = 1 / torch.sqrt(t**2 + self.process.sigma_data**2)
            x = bc(c_in, x) * x
        return x, _TIME[self.time_input](self.process, t).to(torch.float32)

    def forward(
        self, x: Tensor, t: Tensor, cond: Any = None, *, taps: Sequence[str] = (), **call: Any
    ) -> Prediction:
        """x (b, *d), t (b,) process time -> Prediction in float32 or better, with the tapped features."""
        scaled, time = self._inputs(x, t)
        raw, features = self.net(scaled, time, cond, taps=taps, **call)
        return from_raw(self.process, self.prediction, x, t, raw, features)

    def features(self, x: Tensor, t: Tensor, cond: Any, taps: Sequence[str]) -> Mapping[str, Tensor]:
        """Only the tapped activations; the network stops after the last of them."""
        scaled, time = self._inputs(x, t)
        return self.net(scaled, time, cond, taps=taps, stop=True)[1]


class Rescheduled(nn.Module):
    """A denoiser re-expressed in another process by matching noise levels.

    D_other(x, t) = D_base(c x, t'), where t' has the angle of t, clamped to the base's range, and
    c = |(alpha, sigma)|_base / |(alpha, sigma)|_other. The angle stays finite at the prior, where the ratio
    sigma / alpha of a flow is infinite; beyond the base's noisiest level it answers as at that level.
    """

    def __init__(self, denoiser: nn.Module, process: Process) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = process

    def _match(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        base: Process = self.denoiser.process  # type: ignore[assignment]
        t_base = base.t_of_angle(angle_of(self.process, t))
        norm = torch.hypot(base.alpha(t_base), base.sigma(t_base))
        c = norm / torch.hypot(self.process.alpha(t), self.process.sigma(t))
        return bc(c, x) * x, t_base

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        base = self.denoiser(*self._match(x, t), cond, **call)
        return from_x0(self.process, x, t, base.x0, base.features)

    def features(self, x: Tensor, t: Tensor, cond: Any, taps: Sequence[str]) -> Mapping[str, Tensor]:
        return self.denoiser.features(*self._match(x, t), cond, taps)  # type: ignore[operator]


class Fourier(nn.Module):
    """Sines and cosines of 2 k angle, k = 1..count, for an angle in [0, pi/2]; then a linear layer."""

    def __init__(self, width: int, count: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequency", 2.0 * torch.arange(1, count + 1))
        self.linear = nn.Linear(2 * count, width)

    def forward(self, angle: Tensor) -> Tensor:
        phase = angle[:, None].to(self.linear.weight.dtype) * self.frequency
        return self.linear(torch.cat((phase.sin(), phase.cos()), -1))
