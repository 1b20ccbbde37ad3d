"""The flow map of a mixture, by its quantiles, at the methods: nothing here is affine in x."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trajectory_helpers import F64, TIGHT, Batch64, draws

from fewstep.algebra.jump import jump
from fewstep.algebra.pairings import Grid
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import VP, Flow, Process, Trig
from fewstep.methods.consistency import Consistency
from fewstep.methods.kd import KD
from fewstep.methods.meanflow import MeanFlow
from fewstep.methods.scm import SCM
from fewstep.methods.segments import Segments
from fewstep.networks.analytic import Mixture, flow_map
from fewstep.networks.roles import Roles
from fewstep.objectives import trajectory as tr
from fewstep.objectives.legs import Teacher

WEIGHTS, MEANS, STDS = (0.3, 0.7), (-1.2, 0.8), (0.25, 0.35)
PROCESSES: dict[str, Process] = {"flow": Flow(), "edm": TIGHT, "vp": VP(), "trig": Trig()}
WRONG = ["shifted", "moments"]


def mixture(process: Process) -> Mixture:
    return Mixture(process, WEIGHTS, [[m] for m in MEANS], STDS)


def distribution(process: Process, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(P(x_t < x), density) of the noised mixture at x (b, 1), t (b,)."""
    below, density = torch.zeros_like(x), torch.zeros_like(x)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True):
        spread = torch.sqrt((alpha * s) ** 2 + sigma**2)
        z = (x - alpha * m) / spread
        below = below + w * torch.special.ndtr(z)
        density = density + w * torch.exp(-(z**2) / 2) / (spread * (2 * torch.pi) ** 0.5)
    return below, density


def transport(process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The flow map t -> s: the same quantile, by bisection and one Newton step, which also carries tangents."""
    want = distribution(process, x, t)[0]
    low, high = torch.full_like(x, -600.0), torch.full_like(x, 600.0)
    for _ in range(64):
        middle = (low + high) / 2
        under = distribution(process, middle, s)[0] < want
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    middle = (low + high) / 2
    got, density = distribution(process, middle, s)
    return middle - (got - want) / density


def integrate(net: Any, x: Tensor, t: Tensor, s: Tensor, steps: int = 32) -> Tensor:
    """Runge and Kutta's fourth order along the teacher's velocity, evenly spaced in levels; s above the clean end."""
    first, last, process = net.process.level(t), net.process.level(s), net.process
    for k in range(steps):
        a, b = (process.grid(first + (last - first) * j / steps) for j in (k, k + 1))
        h, middle = (b - a)[:, None], (a + b) / 2
        k1 = net(x, a).velocity()
        k2 = net(x + h / 2 * k1, middle).velocity()
        k3 = net(x + h / 2 * k2, middle).velocity()
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + net(x + h * k3, b).velocity())
    return x


class Chord(nn.Module):
    """A map as a student that takes its destination. kind: exact; shifted, its x0 moved by .05 cos 3x; moments, the
    flow map of the Gaussian with the mixture's mean and variance."""

    takes_s, inputs = True, ("s",)

    def __init__(self, process: Process, kind: str = "exact") -> None:
        super().__init__()
        self.process, self.kind, self.inner = process, kind, mixture(process)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, s: Tensor | None = None, **call: Any) -> Prediction:
        s = t if s is None else s
        there = s != t
        if not bool(there.any()):
            return self.inner(x, t)
        # A where would carry a zero tangent to s = 0, where VP's slope is infinite.
        apart = s if bool(there.all()) else torch.where(there, s, torch.where(t > 0, t * 0.5, t + 0.1))
        if self.kind == "moments":
            mean = sum(w * m for w, m in zip(WEIGHTS, MEANS, strict=True))
            second = sum(w * (m**2 + v**2) for w, m, v in zip(WEIGHTS, MEANS, STDS, strict=True))
            moved = flow_map(self.process, mean, (second - mean**2) ** 0.5, x, t, apart)
        else:
            moved = transport(self.process, x, t, apart)
        x0 = tr.chord_x0(self.process, x, t, moved, apart)
        if self.kind == "shifted":
            x0 = x0 + 0.05 * torch.cos(3 * x)
        x0 = torch.where(there[:, None], x0, self.inner(x, t).x0)
        return from_x0(self.process, x, t, x0)


def points(process: Process) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (b, 1) from the noised mixture at t, and t > u > s; every third s is the clean end."""
    level = torch.tensor([[0.95, 0.7, 0.3], [0.6, 0.5, 0.45], [0.8, 0.4, 0.0]], dtype=F64).repeat(4, 1)
    t, u, s = process.grid(level).unbind(1)
    d = draws(len(t), "mixture")
    k = (d.uniform() < WEIGHTS[1]).long()
    x0 = torch.tensor(MEANS, dtype=F64)[k] + torch.tensor(STDS, dtype=F64)[k] * d.normal(1, dtype=F64)[:, 0]
    x = process.alpha(t) * x0 + process.sigma(t) * d.normal(1, dtype=F64)[:, 0]
    return x[:, None], t, u, s


@pytest.mark.parametrize("name", PROCESSES)
def test_the_teachers_ode_and_then_the_quantile_map_is_the_quantile_map(name: str) -> None:
    process = PROCESSES[name]
    x, t, u, s = points(process)
    teacher, gaps = mixture(process), {}
    for kind in ("exact", *WRONG):
        student = Chord(process, kind)
        target = tr.two_leg(
            lambda x, t, s: integrate(teacher, x, t, s, 64),
            lambda x, t, s, student=student: jump(student, x, t, s),
            x,
            t,
            u,
            s,
        )
        gaps[kind] = float((target - jump(student, x, t, s)).abs().max())
    # The fourth-order solver's own error; the map itself is exact to rounding.
    assert gaps["exact"] < 1e-6
    assert min(gaps[kind] for kind in WRONG) > 1e-2


@pytest.mark.parametrize("kind", ["velocity", "trig"])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_quantile_map_obeys_the_eulerian_condition(name: str, kind: str) -> None:
    process = PROCESSES[name]
    x, t, _, s = points(process)
    v, slope = mixture(process)(x, t).velocity(), tr.slopes(process, kind, t, s, "t")
    sizes = {}
    for what in ("exact", *WRONG):
        raw = tr.raw_of(Chord(process, what), kind)
        moved = tr.tangent(raw, (x, t, s), (v, torch.ones_like(t), None))
        residual = tr.eulerian(slope, x, v, raw(x, t, s), moved)
        sizes[what] = float((residual.abs() / (v.abs() + 1)).max())
    assert sizes["exact"] < 1e-8
    assert min(sizes[what] for what in WRONG) > 1e-4


METHODS: list[tuple[Any, str]] = [
    (Consistency(pairing=Grid(points=7)), "flow"),
    (Consistency(pairing=Grid(points=7)), "trig"),
    (Segments(segments=4, knots=16, skip=2), "vp"),
    (KD(steps=(1.0, 0.5), teacher_steps=2), "flow"),
    (MeanFlow(source="teacher", apart=1.0, power=0.0), "flow"),
    (SCM(warmup=1, weighting="one", prior_weight=False), "trig"),
]


@pytest.mark.parametrize(("method", "name"), METHODS, ids=lambda v: getattr(v, "name", v))
def test_methods_rest_at_the_quantile_map(method: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    process = PROCESSES[name]

    def step(self: Teacher, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        # The last leg goes to sigma = 0, where eps and with it the velocity are not defined.
        clean = s == process.grid(torch.zeros_like(s))
        moved = integrate(self, x, t, torch.where(clean, t, s))
        return torch.where(clean[:, None], transport(process, x, t, s), moved)

    monkeypatch.setattr(Teacher, "step", step)
    sizes = {}
    for kind in ("exact", *WRONG):
        who = Roles(teacher=mixture(process), student=Chord(process, kind))
        stepped = "step" in method.losses.__code__.co_varnames
        (losses,) = method.losses(*(who, Batch64.of(24, 1), 5)[: 3 if stepped else 2])
        sizes[kind] = float(losses.total())
    assert sizes["exact"] < 1e-13
    assert min(sizes[kind] for kind in WRONG) > 1e-6
