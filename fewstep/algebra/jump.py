"""One move along a trajectory, by a student in one call or by a teacher's ODE solver in several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import bc

Solver = Literal["ddim", "euler", "heun"]
Net = Callable[..., Prediction]


def ask(net: Net, x: Tensor, t: Tensor, s: Tensor, cond: Any = None, **call: Any) -> Prediction:
    """The answer of `net` for a jump from t to s: networks with a destination time get it, others do not.

    Only with it can one network be exact for several s: the chord's denoiser depends on s.
    """
    return net(x, t, cond, s=s, **call) if getattr(net, "takes_s", False) else net(x, t, cond, **call)


def jump(net: Net, x: Tensor, t: Tensor, s: Tensor, cond: Any = None, **call: Any) -> Tensor:
    """The answer at t taken to s in one step: a flow map in every process, and exactly x where s = t.

    x (b, *d), times (b,) with s <= t; returns (b, *d). A network with a destination time is told s (CTM, arXiv
    2310.02279); for another it is a DDIM step.

    >>> data = fewstep.load("toy/dmd2").data.open()
    >>> exact = data.mixture  # the ring's own denoiser, a flow process
    >>> x = torch.tensor([[1.0, 0.0]])
    >>> fewstep.jump(exact, x, torch.tensor([0.5]), torch.tensor([0.5])).equal(x)
    True
    >>> fewstep.jump(exact, x, torch.tensor([0.5]), torch.tensor([0.0]))  # D(x, t)
    tensor([[0.9258, 0.0000]])
    """
    return ask(net, x, t, s, cond, **call).at(s)


def clean(process: Any, t: Tensor) -> Tensor:
    """The time of the process's clean end, of t's shape: 0, or sigma_min in EDM."""
    return process.grid(torch.zeros_like(t))


def clean_of(net: Net, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Tensor:
    """x0 (b, *d) of the jump from t (b,) to the clean end; x itself in rows that stand there or below it."""
    end = clean(net.process, t)  # type: ignore[attr-defined]
    # Below sigma_min a network is not asked: log 0 would come back as NaN.
    x0 = ask(net, x, torch.maximum(t, end), end, cond, **call).x0
    return torch.where(bc(t, x) <= bc(end, x), x.to(x0.dtype), x0)


def solver_step(net: Net, x: Tensor, t: Tensor, s: Tensor, cond: Any = None, solver: Solver = "ddim") -> Tensor:
    """One step of the probability-flow ODE from t to s.

    ddim: exact for a constant x0 (Euler in sigma/alpha); euler: explicit Euler in t; heun: its trapezoidal
    correction, which falls back to euler where sigma(s) = 0, as EDM does (arXiv 2206.00364, alg. 1).
    """
    here = net(x, t, cond)
    if solver == "ddim":
        return here.at(s)
    velocity = here.velocity()
    h = bc(s - t, x)
    moved = x + h * velocity
    if solver == "euler":
        return moved
    if solver != "heun":
        raise ValueError(f"solver {solver!r} is not one of 'ddim', 'euler', 'heun'")
    at_end = here.process.sigma(s) == 0
    if bool(at_end.all()):
        return moved
    # Rows that end at sigma = 0 are asked at t instead: their second slope is not used, and must not be NaN.
    there = net(moved, torch.where(at_end, t, s), cond).velocity()
    return torch.where(bc(at_end, x).bool(), moved, x + h * 0.5 * (velocity + there))


def solve(net: Net, x: Tensor, times: Tensor, cond: Any = None, solver: Solver = "ddim") -> Tensor:
    """Follow the ODE from x (b, *d) through a decreasing list of times, shape (n,) shared by the batch or (n, b).

    Returns x at the last time, (b, *d).

    Args:
        solver: ddim (arXiv 2010.02502), euler, or heun (arXiv 2206.00364, algorithm 1; two calls a step).

    Raises:
        ValueError: another solver.

    >>> exact = fewstep.load("toy/dmd2").data.open().mixture
    >>> times = torch.linspace(1, 0, 33)
    >>> x = fewstep.solve(exact, torch.tensor([[1.0, 0.5]]), times, solver="heun")
    >>> round(float(x.norm()), 1)  # from noise onto the ring of radius 1.25
    1.2
    """
    for t, s in pairwise(times):
        x = solver_step(net, x, _rows(t, x), _rows(s, x), cond, solver)
    return x


def _rows(t: Tensor, x: Tensor) -> Tensor:
    return t.expand(x.shape[0]) if t.ndim == 0 else t


def calls(steps: int, solver: Solver) -> int:
    """Network calls of a solver that takes `steps` steps and ends at sigma > 0 or, for heun, at sigma = 0."""
    return 2 * steps - 1 if solver == "heun" else steps


def times_of(levels: Sequence[float] | Tensor, process: Any) -> Tensor:
    """Process times float64 of levels u."""
    return process.grid(torch.as_tensor(levels, dtype=torch.float64))
