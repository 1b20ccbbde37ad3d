"""Networks that see x_t of a bridge, as denoisers of y_t = x_t - w1(t) x_T (see fewstep.algebra.bridge)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fewstep.networks.specs  # noqa: F401  registers the networks that are chosen among
from fewstep.algebra.bridge import I2SB, Bridge
from fewstep.algebra.condition import seen
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import bc
from fewstep.config import RecipeError, part
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.extras import goes_to
from fewstep.networks.parts import NetworkPart, Site


class Bridged(nn.Module):
    """A denoiser of x_t as one of y_t. The source x_T is cond["image"], of the samples' shape.

    Only foreign networks and unconditional bridges need it: a conditional bridge of one's own is a network of y_t that is
    shown its source, as any picture.

    Args:
        denoiser: called as denoiser(x_t, t, cond), answers x0 (its `eps` is not used); its process is a bridge.
        sees: it is shown cond["image"] too, a conditional bridge; otherwise it knows x_t alone.
    """

    def __init__(self, denoiser: nn.Module, sees: bool = False) -> None:
        super().__init__()
        if not isinstance(denoiser.process, Bridge):
            raise ValueError(f"a network of the process {denoiser.process} has no source; give it a bridge's")
        self.denoiser = denoiser
        self.sees = sees

    @property
    def process(self) -> Any:
        return self.denoiser.process

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(getattr(self.denoiser, "inputs", ()))

    @property
    def takes_s(self) -> bool:
        return goes_to(self.inputs)

    def add_image(self, channels: int) -> None:
        """Show the network its source too, without effect yet. Raises ValueError where it sees it."""
        if self.sees:
            raise ValueError("it sees its source already")
        self.denoiser.add_image(channels)  # type: ignore[operator]
        self.sees = True

    def add_inputs(self, names: tuple[str, ...]) -> None:
        self.denoiser.add_inputs(names)  # type: ignore[operator]

    def at_source(self, y: Tensor, t: Tensor, cond: Any) -> tuple[Tensor, Any]:
        """(x_t, the condition that the network is shown). Raises ValueError for a source of another shape than y."""
        source = cond.get("image") if isinstance(cond, Mapping) else None
        if source is None or source.shape != y.shape:
            told = "none" if source is None else str(tuple(source.shape))
            raise ValueError(f"a bridge starts from cond['image'] of the samples' shape {tuple(y.shape)}, not {told}")
        x = y + bc(self.process.source(t), y) * source
        return x, seen(cond, () if self.sees else ("image",))

    def forward(self, y: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        x, shown = self.at_source(y, t, cond)
        answer = self.denoiser(x, t, shown, **call)
        return from_x0(self.process, y, t, answer.x0, answer.features)

    def features(self, y: Tensor, t: Tensor, cond: Any, taps: Sequence[str]) -> Mapping[str, Tensor]:
        x, shown = self.at_source(y, t, cond)
        return self.denoiser.features(x, t, shown, taps)  # type: ignore[operator]


class I2SBNet(nn.Module):
    """A network by I2SB's convention, net(x_t, t, cond) = (x_t - x0) / s(t), as what `Bridged` wraps."""

    def __init__(self, net: nn.Module, process: I2SB) -> None:
        super().__init__()
        self.net, self.process = net, process

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        raw = self.net(x, t, cond)
        return from_x0(self.process, x, t, x - bc(self.process.spent(t).sqrt(), x) * raw)


class DDBMNet(nn.Module):
    """A network by DDBM's preconditioning, D = c_skip x_t + c_out net(c_in x_t, t, cond), as what `Bridged` wraps.

    With the weights a of x_T, b of x0, the variance c and Gaussian data: c_in^-2 = a^2 sT^2 + b^2 s0^2 + 2 a b s0T + c,
    c_skip = (b s0^2 + a s0T) c_in^2, c_out = sqrt(a^2 (sT^2 s0^2 - s0T^2) + s0^2 c) c_in (arXiv 2309.16948, sec. 4.2):
    the best linear denoiser of x_t and the deviation of what it leaves.

    Args:
        std, end: deviations s0 of the data and sT of the source; both: their covariance s0T.
    """

    def __init__(self, net: nn.Module, process: Bridge, std: float, end: float, both: float) -> None:
        super().__init__()
        self.net, self.process = net, process
        self.std, self.end, self.both = std, end, both

    def scalings(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_in, c_skip, c_out) at times t (b,)."""
        p: Any = self.process
        a, b, c = p.source(t), p.alpha(t), p.variance(t)
        data, end = self.std**2, self.end**2
        c_in = 1 / torch.sqrt(a**2 * end + b**2 * data + 2 * a * b * self.both + c)
        rest = a**2 * (end * data - self.both**2) + data * c
        return c_in, (b * data + a * self.both) * c_in**2, torch.sqrt(rest) * c_in

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        c_in, c_skip, c_out = self.scalings(t)
        x0 = bc(c_skip, x) * x + bc(c_out, x) * self.net(bc(c_in, x) * x, t, cond)
        return from_x0(self.process, x, t, x0)  # type: ignore[arg-type]


@part("network", "bridged")
class BridgedSpec:
    """A network of x_t of a bridge whose source is the picture in the data's conditions; for unconditional bridges."""

    of: NetworkPart
    """The network, on a process bridge, i2sb or ddbm, with prediction x0: it does not see y, which others are about."""
    sees: bool = False
    """It is shown the source too, a conditional bridge. A student has to be: else x_T's slope and its own spread share
    one parameter."""

    def build(self, site: Site) -> nn.Module:
        if site.image is None or tuple(site.image) != tuple(site.shape):
            held = "none" if site.image is None else str(list(site.image))
            raise RecipeError(
                f"bridged: a bridge starts from a picture of the samples' shape {list(site.shape)}, and the data's "
                f"conditions hold {held}; degrade by blur, box or another that keeps the size"
            )
        inner = self.of.build(replace(site, image=site.image if self.sees else None))
        if not isinstance(inner, Denoiser) or inner.prediction != "x0":
            raise RecipeError("bridged.of: takes a network of its own with prediction: x0, such as dit")
        try:
            return Bridged(inner, self.sees)
        except ValueError as error:
            raise RecipeError(f"bridged.of: {error} (process: {{name: bridge}})") from None
