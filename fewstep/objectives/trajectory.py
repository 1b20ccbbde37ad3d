"""Trajectory targets: two legs, and their two limits, the Eulerian and the Lagrangian condition of a flow map.

A student's jump from t to s is J = A x + B raw, with raw its output in a parametrisation of the pair (x0, eps).
An exact flow map satisfies, for the velocity v(x, t) = dx/dt,

    Eulerian    dJ/dt = A_t x + A v + B_t raw + B draw/dt = 0   along (dx/dt, dt/dt, ds/dt) = (v, 1, 0)
    Lagrangian  dJ/ds - v(J, s) = A_s x + B_s raw + B draw/ds - v(J, s) = 0

and a two-leg target is second(first(x, t -> u), u -> s). Continuous targets are raw - gain R: solving R = 0 for
raw would divide by B_t or B_s, which vanish (x0 at s = 0, Trig at the full jump).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.algebra.jump import ask
from fewstep.algebra.prediction import PAIRS, Prediction
from fewstep.algebra.process import Process, bc
from fewstep.config import UserError
from fewstep.kernels import attention_in_force, use_fewstep_attention
from fewstep.objectives.regression import per_sample

Tangent = Literal["jvp", "central", "semi"]
Leg = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x at time t, t, s) -> x at time s."""
Distance = Literal["mse", "l1", "huber", "huber_sample"]


@torch.no_grad()
def two_leg(first: Leg, second: Leg, x: Tensor, t: Tensor, u: Tensor, s: Tensor) -> Tensor:
    """second(first(x, t -> u), u -> s) without a gradient, t >= u >= s; times (b,), x (b, *d) -> (b, *d).

    A leg is called as leg(x, from, to); the target of shortcut models (arXiv 2410.12557) is one of two half steps.

    >>> exact = fewstep.load("toy/dmd2").data.open().mixture
    >>> leg = lambda x, t, s: fewstep.jump(exact, x, t, s)
    >>> x = torch.tensor([[1.0, 0.5]])
    >>> t, u, s = torch.tensor([0.9]), torch.tensor([0.5]), torch.tensor([0.1])
    >>> fewstep.two_leg(leg, leg, x, t, u, s).equal(leg(leg(x, t, u), u, s))
    True
    """
    return second(first(x, t, u), u, s)


def chord_x0(process: Process, x: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
    """The x0 whose DDIM step from (x, t) lands on x_s: (x_s - k x) / (alpha_s - k alpha_t), k = sigma_s / sigma_t.

    Progressive distillation's target (arXiv 2202.00512, appendix G). x, x_s (b, *d), times (b,).

    Raises:
        ValueError: s = t in some row: a jump of length 0 has no chord.

    >>> x_t, t, x_s, s = torch.tensor([[1.0]]), torch.tensor([0.8]), torch.tensor([[0.7]]), torch.tensor([0.4])
    >>> x0 = fewstep.chord_x0(fewstep.Flow(), x_t, t, x_s, s)
    >>> fewstep.from_raw(fewstep.Flow(), "x0", x_t, t, x0).at(s)  # its DDIM step lands on x_s
    tensor([[0.7000]])
    """
    if bool((s == t).any()):
        raise ValueError("chord_x0 needs s != t in every entry: a jump of length 0 has no chord")
    k = process.sigma(s) / process.sigma(t)
    return (x_s - bc(k, x) * x) / bc(process.alpha(s) - k * process.alpha(t), x)


def distance(a: Tensor, b: Tensor, kind: Distance = "mse", c: float = 1e-3, weight: Tensor | None = None) -> Tensor:
    """A scalar: the batch mean of weight (b,) times a per-sample distance.

    mse, l1: means over a sample. huber: mean of sqrt(e^2 + c^2) - c over elements (LCM). huber_sample:
    (sqrt(|e|^2 + c^2 d) - c sqrt d) / sqrt d on the root mean square, iCT's loss with c = .00054 over sqrt d.
    """
    error = a - b
    if kind == "mse":
        value = per_sample(error**2)
    elif kind == "l1":
        value = per_sample(error.abs())
    elif kind == "huber":
        value = per_sample(torch.sqrt(error**2 + c**2) - c)
    elif kind == "huber_sample":
        value = torch.sqrt(per_sample(error**2) + c**2) - c
    else:
        raise ValueError(f"distance {kind!r} is not one of mse, l1, huber, huber_sample")
    return (value if weight is None else value * weight.to(value.dtype)).mean()


def coefficients(process: Process, kind: str, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """A, B (b,) of the jump J = A x + B raw from t to s in the parametrisation `kind`."""
    a, b = PAIRS[kind](process, t)
    alpha, sigma, alpha_s, sigma_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
    det = alpha * b - sigma * a
    return (alpha_s * b - sigma_s * a) / det, (sigma_s * alpha - alpha_s * sigma) / det


@dataclass(frozen=True)
class Slopes:
    """A jump's coefficients and their derivatives in t or in s, each (b,)."""

    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor


def slopes(process: Process, kind: str, t: Tensor, s: Tensor, wrt: Literal["t", "s"]) -> Slopes:
    """coefficients and their partial derivatives, by forward mode on the scalars in float64."""
    t, s = t.double(), s.double()
    # Only the moving time is differentiated: at a clean end 0 times an infinite slope would be NaN.
    move, one = (t if wrt == "t" else s), torch.ones_like(t)

    def at(m: Tensor) -> tuple[Tensor, Tensor]:
        return coefficients(process, kind, m, s) if wrt == "t" else coefficients(process, kind, t, m)

    primal, slope = torch.func.jvp(at, (move,), (one,))[:2]
    return Slopes(primal[0], primal[1], slope[0], slope[1])


def _attention() -> AbstractContextManager[Any]:
    """Attention with tangents for everything inside, unless the recipe's own choice is already in force."""
    return nullcontext() if attention_in_force() else use_fewstep_attention()


def tangent(
    raw: Callable[[Tensor, Tensor, Tensor], Tensor],
    at: tuple[Tensor, Tensor, Tensor],
    along: tuple[Tensor | None, Tensor | None, Tensor | None],
    mode: Tangent = "jvp",
    step: float = 5e-3,
    floor: Tensor | None = None,
    ceiling: Tensor | float | None = None,
) -> Tensor:
    """Derivative of raw(x, t, s) along (dx, dt, ds), without a gradient; (b, *d). None is a direction held fixed.

    jvp: forward mode. central: (f(+h) - f(-h)) / 2h with h = step. semi: forward mode in x and a backward
    difference in the times (rCM, arXiv 2510.08431, fd_type 1), for networks whose time embedding has no
    forward rule. Rows whose moving time would fall below `floor` (b,) look ahead, (f(+h) - f) / h, in both; rows
    of which it would exceed `ceiling` look back. Where neither side has room for h, h is the larger room.

    >>> x, t, s = torch.tensor([[2.0]]), torch.tensor([0.5]), torch.tensor([0.0])
    >>> fewstep.tangent(lambda x, t, s: t[:, None] * x**2, (x, t, s), (torch.ones(1, 1), torch.ones(1), None))
    tensor([[6.]])
    """
    moving = [i for i, d in enumerate(along) if d is not None]
    steps = [along[i].to(at[i].dtype) for i in moving]  # type: ignore[union-attr]

    def move(f: Callable[..., Tensor], which: list[int], by: list[Tensor]) -> Tensor:
        def some(*values: Tensor) -> Tensor:
            full = list(at)
            for i, value in zip(which, values, strict=True):
                full[i] = value
            return f(*full)

        return torch.func.jvp(some, tuple(at[i] for i in which), tuple(by))[1]

    def rowwise(h: float | Tensor, like: Tensor) -> float | Tensor:
        return bc(h, like).to(like.dtype) if isinstance(h, Tensor) else h

    def shifted(h: float | Tensor, which: list[int]) -> list[Tensor]:
        full = list(at)
        for i, d in zip(moving, steps, strict=True):
            full[i] = at[i] + rowwise(h, d) * d if i in which else at[i]
        return full

    back, ahead = _reach(at[moving[-1]], steps[-1], step, floor, ceiling) if moving[-1] else (step, step)

    # In half precision a difference of two answers is mostly rounding, and some layers have no rule for forward mode.
    full = torch.autocast(at[0].device.type, enabled=False)
    with torch.no_grad(), full, _attention() if mode != "central" else nullcontext():
        if mode == "jvp":
            return move(raw, moving, steps)
        if mode == "central":
            change = raw(*shifted(ahead, moving)) - raw(*shifted(-back, moving))
            return change / rowwise(ahead + back, change)
        if mode == "semi":
            by = torch.where(back > 0, -back, ahead) if isinstance(back, Tensor) else -back
            change = raw(*shifted(by, [1, 2])) - raw(*at)
            change = change / rowwise(by, change)
            return change + move(raw, [0], steps[:1]) if 0 in moving else change
    raise ValueError(f"tangent {mode!r} is not one of jvp, central, semi")


def _reach(
    t: Tensor, d: Tensor, step: float, floor: Tensor | None, ceiling: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    """How far (b,) a difference along d may go back and ahead from t: `step`, or 0 on the side of a bound."""
    inf = torch.full_like(t, math.inf)
    low = inf if floor is None else (t - floor) / d
    high = inf if ceiling is None else (ceiling - t) / d
    back, ahead = (torch.where(room >= step, step, torch.zeros_like(t)) for room in (low, high))
    narrow = (back == 0) & (ahead == 0)
    # At s = t = 1 there is no room at all: the derivative has the factor t - s there, it only must not be NaN.
    some = torch.maximum(low, high).clamp(1e-4, step)
    back = torch.where(narrow & (low >= high), some, back)
    return back, torch.where(narrow & (low < high), some, ahead)


def raw_of(net: Callable[..., Prediction], kind: str, cond: Any = None, **call: Any) -> Callable[..., Tensor]:
    """The network as (x, t, s) -> raw in the parametrisation `kind`; what tangents are taken of."""
    return lambda x, t, s: ask(net, x, t, s, cond, **call).raw(kind)


def eulerian(slope: Slopes, x: Tensor, v: Tensor, raw: Tensor, draw: Tensor, warmup: float = 1.0) -> Tensor:
    """dJ/dt (b, *d) at x with velocity v, from `slopes(..., "t")` and draw = d raw/dt along (v, 1, 0).

    `warmup` in [0, 1] scales the part A_t x + B draw; at 0 what is left asks for raw = v (sCM, arXiv
    2410.11081, sec. 4.1).
    """
    follow = bc(slope.a, x) * v + bc(slope.db, x) * raw
    return follow + warmup * (bc(slope.da, x) * x + bc(slope.b, x) * draw)


def lagrangian(slope: Slopes, x: Tensor, raw: Tensor, draw: Tensor, v_end: Tensor) -> Tensor:
    """dJ/ds - v(J, s) (b, *d), from `slopes(..., "s")`, draw = d raw/ds and v_end = v(J, s)."""
    return bc(slope.da, x) * x + bc(slope.db, x) * raw + bc(slope.b, x) * draw - v_end


def toward_raw(raw: Tensor, residual: Tensor, gain: float | Tensor = 1.0) -> Tensor:
    """The target raw - gain residual, without a gradient; gain a number or (b,)."""
    gain = bc(gain, residual) if isinstance(gain, Tensor) else gain
    return (raw - gain * residual).detach()


def bounded(g: Tensor, c: float = 0.1, norm: Literal["rms", "l2"] = "l2") -> Tensor:
    """g / (|g| + c) per sample, so that a rare steep tangent cannot set the step (sCM, eq. 8's normalisation)."""
    size = g.flatten(1).norm(dim=1)
    if norm == "rms":
        size = size / g[0].numel() ** 0.5
    return g / bc(size + c, g)


def adaptive(error: Tensor, power: float, c: float = 1e-3) -> Tensor:
    """mean over the batch of e / sg(e + c)^p for the per-sample mean square e of `error` (MeanFlow, eq. 22).

    The paper's e is a sum over d elements, so its c = 1e-3 stands for 1e-3 / d here.
    """
    squared = per_sample(error**2)
    return (squared / (squared.detach() + c) ** power).mean()


def forward_directions(mode: Tangent, along: str) -> str:
    """Which of the directions x, t, s that a method moves along, such as "xt", forward mode is asked for."""
    return {"jvp": along, "semi": "x" if "x" in along else "", "central": ""}[mode]


@torch.no_grad()
def probe(
    net: nn.Module,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Any = None,
    kind: str = "velocity",
    along: str = "xt",
) -> float:
    """Relative difference between forward mode and central differences on this network; raises when they disagree.

    A custom operator without a forward rule gives a tangent of zero and no error, and training on it goes wrong
    silently. `along` holds the directions to look at, of x, t and s; s on its own, because a step along it is
    small beside one along the others. Raises UserError for a tangent that is missing, zero or more than 10 % off
    the best of six step sizes.
    """
    raw, one = raw_of(net, kind, cond), torch.ones_like(t)
    ways: list[tuple[Tensor | None, Tensor | None, Tensor | None]] = []
    if set(along) & {"x", "t"}:
        ways.append((0.5 * torch.ones_like(x) if "x" in along else None, one if "t" in along else None, None))
    if "s" in along:
        ways.append((None, None, one))
    weights = {n: p for n, p in net.named_parameters() if p.is_floating_point()}
    before = {n: p.clone() for n, p in weights.items()}

    def still() -> bool:
        """Outputs or inputs that are initialised to zero have no tangent to compare."""
        moved = [tangent(raw, (x, t, s), way, "central", 1e-2) for way in ways]
        return not all(bool(v.abs().max() > 0) for v in [raw(x, t, s), *moved])

    gaps = []
    try:
        if still():
            generator = torch.Generator().manual_seed(0)
            for p in weights.values():
                p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p))
        for way in ways:
            gaps.append(_gap(raw, (x, t, s), way))
    finally:
        for n, p in weights.items():
            p.copy_(before[n])
    gap = max(gaps, default=0.0)
    if not gap < 0.1:
        half = next((n for n, p in net.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
        if half:
            raise UserError(
                f"finite differences tell nothing of this network, whose {half} is in half precision (they disagree with "
                f"forward mode by {gap:.0%}); set teacher.dtype=fp32, train.precision may stay what it is"
            )
        raise UserError(
            f"forward mode and finite differences disagree by {gap:.0%} on this network (a layer without a "
            "forward rule has a tangent of zero); set tangent: central, or replace that layer"
        )
    return gap


def _gap(raw: Callable[..., Tensor], at: tuple[Tensor, Tensor, Tensor], along: Any) -> float:
    """Relative difference of forward mode to the nearest of six central differences."""
    try:
        forward = tangent(raw, at, along, "jvp")
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(f"this network has no forward-mode derivative: {error}; set tangent: central") from None
    gaps = []
    # Time embeddings of high frequency need tiny steps, rounding in float32 needs large ones.
    for step in (3e-2, 1e-2, 3e-3, 1e-3, 2e-4, 4e-5):
        difference = tangent(raw, at, along, "central", step)
        gaps.append(float((forward - difference).norm() / difference.norm().clamp_min(1e-12)))
    return min(gaps)


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, decay: float) -> None:
    """target := decay target + (1 - decay) source, parameter by parameter; decay 0 copies."""
    mine: list[Tensor] = list(target.parameters())
    theirs: list[Tensor] = list(source.parameters())
    torch._foreach_lerp_(mine, theirs, 1 - decay)
