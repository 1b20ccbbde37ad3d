"""A few-step sampler fitted to a frozen denoiser, without training: the weight of its history at each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.algebra.jump import times_of
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import DiscreteVP, Process

Net = Callable[..., Prediction]
Finer = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Maps states (b, *d) from time t to s, float64 0-d tensors; s is None for the clean end."""


def nodes(process: Process, points: int) -> tuple[float, ...]:
    """`points` levels u, even from the prior down, on a DDPM table rounded to its rows; the clean end is not named.

    Raises ValueError for more points than the table has rows.
    """
    if not isinstance(process, DiscreteVP):
        return tuple(1 - i / points for i in range(points))
    if points > process.steps:
        raise ValueError(f"points must be at most {process.steps}, the rows of the table, not {points}")
    return tuple((process.steps - i * process.steps // points) / process.steps for i in range(points))


def asked(net: Net, cond: Any, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
    """x0 (b, *d), float64, of states (b, *d) at a shared time; the net sees them in `dtype`."""

    def x0(x: Tensor, t: Tensor | None) -> Tensor:
        assert t is not None
        return net(x.to(dtype), t.expand(len(x)), cond).x0.double()

    return x0


def transfer(process: Process, x: Tensor, x0: Tensor, t: Tensor | None, s: Tensor | None) -> Tensor:
    """alpha_s x0 + sigma_s eps with eps from x and x0; x0 itself at the clean end (s is None)."""
    if s is None:
        return x0
    assert t is not None
    return from_x0(process, x, t.expand(len(x)), x0).at(s.expand(len(x)))


@torch.no_grad()
def fit_history(
    net: Net,
    noise: Tensor,
    cond: Any,
    levels: Sequence[float],
    substeps: int = 10,
    own: Literal["teacher", "student"] = "teacher",
    finer: Finer | None = None,
) -> tuple[float, ...]:
    """The weights of `Sampler.history` at these levels: D-ODE (arXiv 2309.16421, alg. 1).

    Each is the least-squares weight that brings a DDIM step onto the net's own trajectory, which takes `substeps` DDIM
    steps, even in u, for every one of the levels. Published: substeps 10. The paper's lambda stands on the finished
    step, so that it is alpha_s - sigma_s alpha_t / sigma_t times the weight here.

    Args:
        net: denoiser with a `process`, guidance inside: under another scale the weights mean nothing.
        noise: standard normal (b, *d); states are kept in float64 whatever its dtype, which the net sees.
        cond: conditions of these rows, or None.
        own: whose states the finer steps go on from; student is what the paper's text could be taken for, and worse.
        finer: in place of those steps.

    Returns:
        One weight a level, the first 0; 0 where the step before says nothing new.
    """
    process: Process = net.process  # type: ignore[attr-defined]
    times = [*times_of(levels, process).to(noise.device), None]
    first = times[0]
    assert first is not None
    x = y = process.prior(noise.double(), first.expand(len(noise)))
    ask = asked(net, cond, noise.dtype)
    finer = finer or _substeps(process, ask, substeps)
    weights, before = [], None
    for t, s in pairwise(times):
        y = finer(x if own == "student" else y, t, s)
        x0 = ask(x, t)
        plain, weight = transfer(process, x, x0, t, s), 0.0
        if before is not None:
            push = transfer(process, x, 2 * x0 - before, t, s) - plain
            size = float(push.square().sum())
            weight = float((push * (y - plain)).sum()) / size if size > 1e-20 else 0.0
            plain = plain + weight * push
        weights.append(weight)
        x, before = plain, x0
    return tuple(weights)


def _substeps(process: Process, ask: Callable[[Tensor, Tensor | None], Tensor], count: int) -> Finer:
    """`count` DDIM steps, even in u."""

    def go(x: Tensor, t: Tensor, s: Tensor | None) -> Tensor:
        high = float(process.level(t))
        low = 0.0 if s is None else float(process.level(s))
        inner = times_of([high + (low - high) * k / count for k in range(1, count)], process).to(t)
        for a, b in pairwise([t, *inner, s]):
            x = transfer(process, x, ask(x, a), a, b)
        return x

    return go


def multistep(process: Process, levels: Sequence[float]) -> tuple[float, ...]:
    """The weights of `Sampler.history` that are DPM-Solver++(2M), midpoint (arXiv 2211.01095, alg. 2).

    h_i / (2 h_{i-1}) with h the steps of log(alpha / sigma), 0 at the first level, at the second where alpha is 0 at
    the first, and at the last, whose step is endless (diffusers: lower_order_final False, final_sigmas_type zero).
    """
    t = times_of(levels, process)
    ratio = (process.alpha(t).log() - process.sigma(t).log()).tolist()
    steps = [b - a for a, b in pairwise(ratio)]
    inner = [b / (2 * a) for a, b in pairwise(steps)]
    return (0.0, *inner, 0.0)[: len(levels)] if len(levels) > 1 else (0.0,)
