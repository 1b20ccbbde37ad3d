"""A network as a denoiser: the border at which parametrisation, input scale and time input are converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.algebra.condition import seen
from fewstep.algebra.noising import angle_of
from fewstep.algebra.prediction import PAIRS, Prediction, from_raw, from_x0
from fewstep.algebra.process import EDM, Process, bc
from fewstep.networks.extras import ANGLE, goes_to, values_of

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
        prediction: what net returns, a `kind` of `fewstep.from_raw`.
        time_input: what net takes as its time: t, 1000t, index (of a table), angle, log_sigma/4 or 250log_sigma.

    `ignore` are keys of conditions that it is not shown, `see` maps a key to the one whose picture stands there for it.

    >>> class Net(torch.nn.Module):
    ...     def forward(self, x, time, cond=None, taps=(), stop=False):
    ...         return -x, {}
    >>> denoiser = fewstep.Denoiser(Net(), fewstep.Flow(), "velocity", "t")
    >>> denoiser(torch.ones(1, 2), torch.tensor([0.5])).x0  # x - t velocity
    tensor([[1.5000, 1.5000]])
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
        self.stops_early = True
        self.ignore: tuple[str, ...] = ()
        self.see: dict[str, str] = {}

    def _inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.prediction in ("edm", "cm"):
            assert isinstance(self.process, EDM)
            c_in = 1 / torch.sqrt(t**2 + self.process.sigma_data**2)
            x = bc(c_in, x) * x
        return x, _TIME[self.time_input](self.process, t).to(torch.float32)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Scalar inputs beside the time, of "s", "length", "w" and "mirror"."""
        return tuple(getattr(self.net, "extras", ()))

    @property
    def image_channels(self) -> int:
        """Channels of the picture that conditions it, cond["image"]; 0 for none."""
        return int(getattr(self.net, "image_channels", 0))

    @property
    def iterates(self) -> tuple[str, ...]:
        """Taps whose features are answers too, in the order in which the network comes by them; of an iterative one."""
        return tuple(getattr(self.net, "iterates", ()))

    @property
    def takes_s(self) -> bool:
        """True: the answer at (x, t) depends on the destination s, as a flow map's must."""
        return goes_to(self.inputs)

    def add_image(self, channels: int) -> None:
        """Give the network input channels of a picture that have no effect yet. Raises ValueError where it cannot."""
        if not hasattr(self.net, "add_image"):
            raise ValueError(f"a {type(self.net).__name__} takes no picture as further channels")
        self.net.add_image(channels)  # type: ignore[operator]

    def add_inputs(self, names: tuple[str, ...]) -> None:
        """Give the network further inputs that have no effect yet. Raises ValueError where it cannot have any."""
        extras: Any = getattr(self.net, "extras", None)
        if extras is None:
            raise ValueError(f"a {type(self.net).__name__} takes no further inputs, asked for {', '.join(names)}")
        extras.add(names)

    def _extras(self, t: Tensor, given: Mapping[str, Tensor | None]) -> dict[str, Any]:
        """Angles of the inputs; left out, s is t (the instantaneous denoiser), w 1 and mirror 0."""
        taken = {*self.inputs, *(("s",) if self.takes_s else ())}
        surplus = [n for n, value in given.items() if value is not None and n not in taken]
        if surplus:
            raise ValueError(f"this network does not take {', '.join(surplus)}; name it under `inputs`")
        if not self.inputs:
            return {}
        values = values_of(self.process, self.inputs, t, **given)
        return {"extras": {n: ANGLE[n](self.process, v).to(torch.float32) for n, v in values.items()}}

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Any = None,
        *,
        taps: Sequence[str] = (),
        s: Tensor | None = None,
        w: Tensor | None = None,
        mirror: Tensor | None = None,
        **call: Any,
    ) -> Prediction:
        """x (b, *d), t (b,) process time -> Prediction in float32 or better, with the tapped features.

        s (b,): process time the answer is meant to jump to; w (b,): embedded guidance; mirror (b,): 0 or 1.
        """
        scaled, time = self._inputs(x, t)
        extras = self._extras(t, {"s": s, "w": w, "mirror": mirror})
        shown = seen(cond, self.ignore, self.see)
        raw, features = self.net(scaled, time, shown, taps=taps, **extras, **call)
        return from_raw(self.process, self.prediction, x, t, raw, features)

    def combine(self, own: Prediction, null: Prediction, scale: float | Tensor) -> Prediction:
        """The guided prediction of the conditional and the unconditional one, as the network's family has it."""
        combine: Any = getattr(self.net, "combine", None)
        if combine is None:
            return own.mix(null, scale)
        raw = combine(own.raw(self.prediction), null.raw(self.prediction), scale)
        return from_raw(self.process, self.prediction, own.x, own.t, raw, own.features)

    def features(self, x: Tensor, t: Tensor, cond: Any, taps: Sequence[str]) -> Mapping[str, Tensor]:
        """Only the tapped activations; the network stops after the last of them."""
        scaled, time = self._inputs(x, t)
        extras = self._extras(t, {"s": None, "w": None, "mirror": None})
        shown = seen(cond, self.ignore, self.see)
        return self.net(scaled, time, shown, taps=taps, stop=self.stops_early, **extras)[1]


class Rescheduled(nn.Module):
    """A denoiser re-expressed in another process by matching noise levels.

    D_other(x, t) = D_base(c x, t'), where t' has the angle of t, clamped to the base's range, and
    c = |(alpha, sigma)|_base / |(alpha, sigma)|_other. The angle stays finite at the prior, where the ratio
    sigma / alpha of a flow is infinite; beyond the base's noisiest level it answers as at that level.

    >>> flow = fewstep.load("toy/dmd2").data.open().mixture
    >>> edm = fewstep.Rescheduled(flow, fewstep.EDM())
    >>> x, t = torch.tensor([[0.5, 0.2]]), torch.tensor([0.5])
    >>> sigma = t / (1 - t)
    >>> torch.allclose(edm(x / (1 - t), sigma).x0, flow(x, t).x0, atol=1e-5)
    True
    """

    def __init__(self, denoiser: nn.Module, process: Process) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = process

    @property
    def inputs(self) -> tuple[str, ...]:
        return getattr(self.denoiser, "inputs", ())

    @property
    def takes_s(self) -> bool:
        return goes_to(self.inputs)

    def add_inputs(self, names: tuple[str, ...]) -> None:
        self.denoiser.add_inputs(names)  # type: ignore[operator]

    @property
    def image_channels(self) -> int:
        return int(getattr(self.denoiser, "image_channels", 0))

    def add_image(self, channels: int) -> None:
        self.denoiser.add_image(channels)  # type: ignore[operator]

    def _time(self, t: Tensor) -> Tensor:
        base: Process = self.denoiser.process  # type: ignore[assignment]
        return base.t_of_angle(angle_of(self.process, t))

    def _match(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        base: Process = self.denoiser.process  # type: ignore[assignment]
        t_base = self._time(t)
        norm = torch.hypot(base.alpha(t_base), base.sigma(t_base))
        c = norm / torch.hypot(self.process.alpha(t), self.process.sigma(t))
        return bc(c, x) * x, t_base

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, s: Tensor | None = None, **call: Any) -> Prediction:
        # A chord's x0 is the same in every process, because a jump with constant x0 and eps is.
        if s is not None:
            call["s"] = self._time(s)
        base = self.denoiser(*self._match(x, t), cond, **call)
        return from_x0(self.process, x, t, base.x0, base.features)

    def combine(self, own: Prediction, null: Prediction, scale: float | Tensor) -> Prediction:
        """`Denoiser.combine` in the base's process, in which its family guides."""
        base: Any = self.denoiser
        inner = base.net if isinstance(base, Denoiser) else base
        if getattr(inner, "combine", None) is None:
            return own.mix(null, scale)
        x, t = self._match(own.x, own.t)
        mixed = base.combine(*(from_x0(base.process, x, t, q.x0) for q in (own, null)), scale)
        return from_x0(self.process, own.x, own.t, mixed.x0, own.features)

    def features(self, x: Tensor, t: Tensor, cond: Any, taps: Sequence[str]) -> Mapping[str, Tensor]:
        return self.denoiser.features(*self._match(x, t), cond, taps)  # type: ignore[operator]
