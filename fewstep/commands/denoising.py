"""Does a network take noise off when it is called as its configs say, or as other configs would say?

Nothing is known of the data here, so a reading is tried on samples that it draws itself: noised to a tenth, a trained
network that is read as it was trained restores them better than any linear filter can. Under a wrong reading it leaves
more; untrained weights leave more under every reading, and then nothing can be told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.process import EDM, DiscreteVP, Flow, Process, bc
from fewstep.networks.denoiser import Denoiser

RATIO = 0.1
"""sigma / alpha at which samples are noised."""
GOOD = 0.7
"""Error over a linear filter's from which a network counts as one that takes noise off; of the digits teacher .38 as it
was trained, 1.05 to 3.4 under the other readings here, and 1.0 or more of untrained networks under all."""
B = 4


def readings(net: Denoiser) -> Iterator[Denoiser]:
    """The same network under every other convention: a DDPM table, EDM's two forms, flow.

    x0 is left out: an untrained network's answer hardly depends on x, and a constant is restored without error.
    """
    own: Any = net.process
    table = own if isinstance(own, DiscreteVP) else DiscreteVP()
    data = sorted({0.5, 1.0} | ({own.sigma_data} if isinstance(own, EDM) else set()))
    known: list[tuple[Process, str, Any]] = [
        (Flow(), "velocity", "1000t"),
        (table, "eps", "index"),
        (table, "v", "index"),
    ]
    forms = (("cm", "250log_sigma"), ("edm", "log_sigma/4"))
    known += [(EDM(sigma_data=s), kind, time) for s in data for kind, time in forms]
    for process, kind, time in known:
        other = Denoiser(net.net, process, kind, time).eval()
        if shown(other) != shown(net):
            yield other


def shown(net: Denoiser) -> str:
    """A reading in words; two that call the network alike at every noise level are the same."""
    p: Any = net.process
    more = f", sigma_data {p.sigma_data:g}" if isinstance(p, EDM) else ""
    more = f", betas {p.schedule} {p.beta_start:g} to {p.beta_end:g}" if isinstance(p, DiscreteVP) else more
    kind = "Flow" if isinstance(p, Flow) else type(p).__name__
    return f"prediction {net.prediction} on {kind}{more}, time {net.time_input}"


@torch.no_grad()
def left_over(net: Denoiser, shape: tuple[int, ...], steps: int = 8) -> float:
    """Squared error of x0 at RATIO over that of the best linear filter, on samples of the net itself; infinite for NaN.

    The samples are of DDIM in `steps` steps from ratio 80, or the noisiest level there is, down to 0.03; the filter knows
    their variance alone.
    """
    p, generator = net.process, torch.Generator().manual_seed(0)
    cond = net.net.example(B, generator)  # type: ignore[operator]
    top = torch.tensor(p.t_max, dtype=torch.float64)
    high = min(80.0, float(p.sigma(top) / p.alpha(top).clamp_min(1e-9)))
    ratios = torch.linspace(high ** (1 / 7), 0.03 ** (1 / 7), steps, dtype=torch.float64) ** 7
    times = p.t_of_angle(ratios.atan())
    x = p.prior(torch.randn(B, *shape, generator=generator), times[:1].expand(B))
    for t, s in pairwise(times):
        x = net(x.float(), t.expand(B), cond).at(s.expand(B))
    x0 = net(x.float(), times[-1:].expand(B), cond).x0.double()
    variance = float(x0.var())
    t = p.t_of_angle(torch.tensor([math.atan(RATIO)], dtype=torch.float64)).expand(B)
    noise = torch.randn(B, *shape, generator=generator, dtype=torch.float64)
    noisy = bc(p.alpha(t), x0) * x0 + bc(p.sigma(t), x0) * noise
    error = float((net(noisy.float(), t, cond).x0 - x0).square().mean())
    ratio = error * (variance + RATIO**2) / (variance * RATIO**2) if variance > 0 else math.inf
    return ratio if math.isfinite(ratio) else math.inf


def denoising(net: Denoiser, x: Tensor) -> tuple[str, bool | None]:
    """(what was found, whether the reading is right); None: no reading of this network takes noise off.

    x: of the shape (b, c, h, w) of the network's input.
    """
    shape = tuple(x.shape[1:])
    own = left_over(net, shape)
    said = f"of its own samples at noise {RATIO:g} it leaves {own:.2f} of a linear filter's error"
    if own < GOOD:
        return said, True
    tried = {other: left_over(other, shape) for other in readings(net)}
    best = min(tried, key=lambda o: tried[o])
    if tried[best] < GOOD:
        return f"{said}, and {tried[best]:.2f} when it is read as {shown(best)}: it was trained so", False
    return f"{said}, and no better under {len(tried)} other readings: weights that are not trained", None
