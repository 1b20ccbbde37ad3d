"""Affine students: where discrete consistency methods come to rest, against slopes written out by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trajectory_helpers import F64, MEAN, STD, Batch64

from fewstep.algebra.pairings import ECTPairs, Grid
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import EDM, Flow, Process, bc
from fewstep.algebra.times import Uniform
from fewstep.methods.consistency import Consistency
from fewstep.methods.tcm import TCM
from fewstep.networks.analytic import gaussian
from fewstep.networks.roles import Roles


class Affine(nn.Module):
    """x0 = MEAN + offset_k + slope_k (x - alpha_k MEAN) at the k-th level of a uniform grid."""

    takes_s, inputs = False, ()

    def __init__(self, process: Process, slopes: Tensor, offset: float = 0.0) -> None:
        super().__init__()
        self.process = process
        self.slopes = nn.Parameter(slopes.clone())
        self.offsets = nn.Parameter(torch.full_like(slopes, offset))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        k = (self.process.level(t) * (len(self.slopes) - 1)).round().long()
        centred = x - bc(self.process.alpha(t), x) * MEAN
        x0 = MEAN + bc(self.offsets[k], x) + bc(self.slopes[k], x) * centred
        return from_x0(self.process, x, t, x0)


def gradient(loss: Tensor, net: Affine) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss, (net.slopes, net.offsets))  # type: ignore[return-value]


def newton(loss: Tensor, *parameters: nn.Parameter) -> None:
    """Every entry to its own minimum with the targets held; exact where the curvature is diagonal."""
    for p, first in zip(parameters, torch.autograd.grad(loss, parameters, create_graph=True), strict=True):
        (second,) = torch.autograd.grad(first.sum(), p, retain_graph=True)
        with torch.no_grad():
            p -= torch.where(second > 0, first / second, torch.zeros_like(first))


def euler_slopes(levels: list[float]) -> Tensor:
    """Slopes (n,) of Euler's chain down to the lowest of ascending levels, for N(m, STD^2) with t = sigma."""
    slopes = [1.0]
    for low, high in pairwise(levels):
        slopes.append(slopes[-1] * (1 - (high - low) * high / (STD**2 + high**2)))
    return torch.tensor(slopes, dtype=F64)


@pytest.mark.parametrize(("points", "golden"), [(3, 8.005443547e-4), (18, 0.00420761882), (40, 0.004637682257)])
def test_cd_with_euler_rests_at_the_chained_slopes_and_nowhere_near(points: int, golden: float) -> None:
    process = EDM()
    levels = process.grid(torch.linspace(0, 1, points, dtype=F64))
    chain = euler_slopes(levels.tolist())
    assert abs(float(chain[-1]) - golden) < 1e-12
    method = Consistency(pairing=Grid(points=points), solver="euler")
    teacher = gaussian(process, MEAN, STD)

    def loss(student: Affine) -> Tensor:
        (losses,) = method.losses(Roles(teacher=teacher, student=student), Batch64.of(600, 1), 0)
        return losses["consistency"]

    # The method itself sets the answer at the lowest level: what the student says there must not matter.
    chain[0] = 3.0
    rest = Affine(process, chain)
    slopes, offsets = gradient(loss(rest), rest)
    assert float(loss(rest).detach()) < 1e-24
    assert float(slopes.abs().max()) < 1e-11
    assert float(offsets.abs().max()) < 1e-11
    # Level 0 is the boundary and has no loss; a slope too steep beside one that is right is pulled down.
    knots = torch.arange(points)
    for parity in (0, 1):
        off = (knots > 0) & (knots % 2 == parity)
        wrong = Affine(process, chain + 0.005 * off)
        assert float(gradient(loss(wrong), wrong)[0][off].min()) > 1e-5
    # The continuous flow map is another map: CD with Euler leaves it and goes to the chain, level by level.
    exact = torch.sqrt((STD**2 + process.sigma_min**2) / (STD**2 + levels**2))
    exact[0] = 3.0
    student = Affine(process, exact)
    assert float(gradient(loss(student), student)[0].abs().max()) > 1e-5
    for _ in range(points - 1):
        newton(loss(student), student.slopes)
    assert abs(float(student.slopes[-1].detach()) - golden) < 1e-12
    assert torch.allclose(student.slopes[1:], chain[1:], rtol=1e-10)


class Quantiles(Batch64):
    """Every pair of 8 symmetric quantiles as (data, noise), repeated: regressions on it are the population's."""

    @staticmethod
    def pairs(count: int) -> tuple[Tensor, Tensor]:
        q = torch.special.ndtri((torch.arange(8, dtype=F64) + 0.5) / 8)
        a, b = torch.meshgrid(q, q, indexing="ij")
        return a.reshape(-1, 1).repeat(count // 64, 1), b.reshape(-1, 1).repeat(count // 64, 1)

    def data(self) -> Tensor:
        return MEAN + STD * self.pairs(len(self))[0]

    def noise(self) -> Tensor:
        return self.pairs(len(self))[1]


def test_tcm_hangs_on_the_first_stage_at_its_boundary_and_chains_above(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, edge, top = Flow(), 2, 5
    levels = torch.linspace(0, 1, top + 1, dtype=F64).tolist()

    def sample(self: ECTPairs, draws: Any, process: Process, step: int) -> tuple[Tensor, Tensor]:
        k = draws.index // 64
        return process.grid((k + 1).double() / top), process.grid(k.double() / top)

    monkeypatch.setattr(ECTPairs, "sample", sample)
    monkeypatch.setattr(ECTPairs, "lower", lambda self, process, t, step: t - 1 / top)
    method = TCM(boundary=edge / top, boundary_fraction=0.0, distance="mse")
    # A first stage that is visibly biased: what lies above the boundary must inherit the bias.
    stage1 = Affine(process, 0.9 - 0.1 * torch.arange(top + 1, dtype=F64), 0.03)
    student = Affine(process, torch.zeros(top + 1, dtype=F64))
    who = Roles(student=student, stage1=stage1)
    before = [p.detach().clone() for p in stage1.parameters()]

    def regressed(slope: float, k: int) -> float:
        """The slope at level k that answers as the given one does at level k - 1."""
        u, t = levels[k - 1], levels[k]
        return slope * ((1 - u) * (1 - t) * STD**2 + u * t) / ((1 - t) ** 2 * STD**2 + t**2)

    # The boundary follows the first stage one level below it, the next level the first stage at the boundary.
    old = stage1.slopes.detach().tolist()
    want = [regressed(old[edge - 1], edge), regressed(old[edge], edge + 1)]
    for k in range(edge + 2, top + 1):
        want.append(regressed(want[-1], k))

    gaps = []
    for step in range(4):
        (turn,) = method.turns(who, step)
        assert turn.updates == ("student",)
        (losses,) = turn.losses(Quantiles.of(64 * top))
        newton(losses.total(), student.slopes, student.offsets)
        gaps.append((student.slopes[edge:].detach() - torch.tensor(want, dtype=F64)).abs())
    # Both of them are right at once, the levels above follow one by one.
    for step, right in enumerate((2, 3, 4, 4)):
        assert float(gaps[step][:right].max()) < 1e-12
        assert bool((gaps[step][right:] > 1e-2).all())
    assert torch.allclose(student.offsets[edge:], torch.full((top - edge + 1,), 0.03, dtype=F64), atol=1e-12)
    # Below the boundary nothing trains, and the first stage never moves.
    assert float(student.slopes[:edge].detach().abs().max()) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, stage1.parameters(), strict=True))


class Constant(nn.Module):
    """The same answer everywhere."""

    takes_s, inputs = False, ()

    def __init__(self, value: float) -> None:
        super().__init__()
        self.process, self.value = Flow(), nn.Parameter(torch.tensor(value, dtype=F64))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        return from_x0(self.process, x, t, self.value.expand(x.shape))


def test_tcm_pairs_that_straddle_the_boundary_take_the_first_stages_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    t = torch.tensor([0.3, 0.4, 0.5, 0.6, 0.9, 1.0], dtype=F64)
    u = torch.tensor([0.2, 0.3, 0.35, 0.4, 0.5, 0.8], dtype=F64)
    monkeypatch.setattr(ECTPairs, "sample", lambda self, draws, process, step: (t, u))
    monkeypatch.setattr(ECTPairs, "lower", lambda self, process, t, step: 0.5 * t)
    student = Constant(1.0)
    who = Roles(student=student, stage1=Constant(0.0))

    def terms(fraction: float, boundary: float = 0.4) -> tuple[Tensor, Tensor]:
        method = TCM(boundary=boundary, boundary_fraction=fraction, distance="mse")
        (losses,) = method.losses(who, Batch64.of(6, 3), 0)
        return losses["consistency"], losses["boundary"]

    # Rows 0 and 1 stand at or below t' and are moved onto it; rows 2 and 3 reach it from above; 4 and 5 do not. Each
    # part is a mean over its own rows, with the weight 1 / (t - u), which is 1 / .2 at t' here.
    inner, boundary = terms(0.0)
    assert abs(float(inner.detach()) - (1 / 0.15 + 1 / 0.2) / 4) < 1e-12
    assert abs(float(boundary.detach()) - 0.1 / 0.2) < 1e-12
    (slope,) = torch.autograd.grad(inner, student.value)
    assert abs(float(slope) - 2 * (1 / 0.15 + 1 / 0.2) / 4) < 1e-12
    # A whole batch at t' has the boundary loss alone.
    inner, boundary = terms(1.0)
    assert float(inner.detach()) == 0
    assert abs(float(boundary.detach()) - 0.1 / 0.2) < 1e-12
    # With t' below all pairs the student's own answer is the target everywhere.
    assert [float(v.detach()) for v in terms(0.0, 0.1)] == [0.0, 0.0]


def test_tcms_boundary_rows_have_the_papers_loss_on_a_student_that_is_the_first_stage() -> None:
    # f = x0 + a sigma eps at every sigma: at t' and at r(t') it answers the same sample a (t' - r) |eps| apart.
    class Off(nn.Module):
        takes_s, inputs, process = False, (), EDM()

        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.3, dtype=F64))

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
            return from_x0(self.process, x, t, self.slope * x)

    student, n = Off(), 32
    level = float(EDM().level(torch.tensor(1.0, dtype=F64)))
    method = TCM(boundary=level, boundary_fraction=1.0)
    (losses,) = method.losses(Roles(student=student, stage1=Off()), Batch64.of(n, 3), 0)
    batch = Batch64.of(n, 3)
    batch.draws.uniform(), batch.draws.uniform()
    noise, r = batch.noise(), 1 - 0.001 * (1 + 8 / (1 + math.e))
    error = 0.3 * (1 - r) * noise.pow(2).mean(1).sqrt()
    want = ((torch.sqrt(error**2 + 1e-16) - 1e-8) / (1 - r)).mean()
    assert abs(float(losses["boundary"].detach()) / (0.1 * float(want)) - 1) < 1e-6
    # An error at the same x and t' would be 0 here, and so would its gradient.
    assert abs(r - 0.99685) < 1e-5
    assert float(torch.autograd.grad(losses["boundary"], student.slope)[0]) > 1e-2


def test_tcm_rests_at_the_answer_to_data_of_one_point() -> None:
    class Point(Batch64):
        def data(self) -> Tensor:
            return torch.full((len(self), 3), 0.6, dtype=F64)

    for value, rests in ((0.6, True), (0.7, False)):
        who = Roles(student=Constant(value), stage1=Constant(0.6))
        (losses,) = TCM(boundary=0.5).losses(who, Point.of(40, 3), 0)
        assert (float(losses["boundary"].detach()) < 1e-12) is rests
        assert float(losses["consistency"].detach()) < 1e-12 or not rests


def test_tcm_puts_the_stated_share_of_the_batch_at_its_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    n, seen = 6000, []

    def counted(a: Tensor, b: Tensor, kind: str, c: float, weight: Tensor) -> Tensor:
        seen.append(float((weight > 0).double().mean()))
        return weight.mean()

    monkeypatch.setattr("fewstep.methods.tcm.distance", counted)
    who = Roles(student=Constant(1.0), stage1=Constant(0.0))
    pairing = ECTPairs(times=Uniform(low=0.0, high=1.0))
    list(TCM(boundary=0.4, boundary_fraction=0.25, pairing=pairing).losses(who, Batch64.of(n, 1), 0))
    # Times are uniform: .4 of them are moved up, and a quarter of the others is drawn. Five standard errors.
    share = 0.4 + 0.25 * 0.6
    assert abs(seen[1] - share) < 5 * (share * (1 - share) / n) ** 0.5
    assert abs(seen[0] + seen[1] - 1) < 1e-12
