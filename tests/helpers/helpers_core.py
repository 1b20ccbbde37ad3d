"""Shared by the core tests: the processes, closed forms written from the text, and quadrature in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.algebra.process import EDM, VP, Cosine, DiscreteVP, Flow, Process, Trig

F64 = torch.float64

PROCESSES: dict[str, Process] = {
    "flow": Flow(),
    "edm": EDM(),
    "trig": Trig(),
    "cosine": Cosine(),
    "vp": VP(),
    "ddpm": DiscreteVP(),
    "sd": DiscreteVP(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
}


def col(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=F64)


def inner_times(process: Process, count: int = 7, low: float = 0.03, high: float = 0.97) -> Tensor:
    """Times strictly inside the process's range, by its own grid."""
    return process.grid(torch.linspace(low, high, count, dtype=F64))


def normal_nodes(count: int = 80) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite nodes and weights for an expectation under N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / math.sqrt(2 * math.pi))


class Recorder(nn.Module):
    """A network that answers by a function of (x, time, cond) and remembers what it was given."""

    def __init__(self, answer: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.answer = answer
        self.seen: list[tuple[Tensor, Tensor, Any]] = []

    def forward(self, x: Tensor, time: Tensor, cond: Any = None, *, taps: Any = (), stop: bool = False) -> Any:
        self.seen.append((x, time, cond))
        return self.answer(x, time, cond), {}


def native(kind: str, alpha: Tensor, sigma: Tensor, da: Tensor, ds: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """What a perfect network of a parametrisation outputs, from the definitions (algorithms 1.2)."""
    x = alpha * x0 + sigma * eps
    var = 0.25
    return {
        "x0": lambda: x0,
        "eps": lambda: eps,
        "v": lambda: alpha * eps - sigma * x0,
        "velocity": lambda: da * x0 + ds * eps,
        "psi": lambda: eps - x0,
        "score": lambda: -eps / sigma,
        "edm": lambda: (x0 - var / (sigma**2 + var) * x) * torch.sqrt(sigma**2 + var) / (sigma * 0.5),
        "cm": lambda: (
            (x0 - var / ((sigma - 0.002) ** 2 + var) * x) * torch.sqrt(sigma**2 + var) / ((sigma - 0.002) * 0.5)
        ),
        "trig": lambda: alpha * eps - sigma * x0,
    }[kind]()


def kinds(process: Process) -> list[str]:
    """The parametrisations that a process has."""
    common = ["x0", "eps", "v", "velocity", "psi", "score", "trig"]
    return [*common, "edm", "cm"] if isinstance(process, EDM) else common


def gaussian_kl(a: Tensor, var_a: Tensor, b: Tensor, var_b: Tensor) -> Tensor:
    """KL(N(a, var_a) || N(b, var_b))."""
    return 0.5 * (torch.log(var_b / var_a) + (var_a + (a - b) ** 2) / var_b - 1)
