"""Affine students reach N(0.7, 0.4^2) from N(0, 0.9^2) by the methods' own losses; phased experts their marginals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distribution_cases import (
    F64,
    MEAN,
    STD,
    Affine,
    Scripted,
    midpoints,
    players,
    student_gradient,
    turn_of,
)
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import fold
from fewstep.algebra.noising import add_noise
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import Flow
from fewstep.algebra.times import Levels
from fewstep.methods.class_ratio import ClassRatio
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.emd import EMD
from fewstep.methods.f_distill import FDistill
from fewstep.methods.gan import Gan
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.methods.sid import SiD
from fewstep.methods.uni_instruct import UniInstruct
from fewstep.methods.vsd import VSD
from fewstep.networks.analytic import gaussian
from fewstep.networks.roles import Roles

LEVELS = Levels(at=(0.1, 0.3, 0.5, 0.7, 0.9))
FAINT = Gan(weight=1e-12)


def fit(method: Any, roles: Roles, steps: int, lr: float, script: Any) -> Tensor:
    """Adam with a linearly falling rate on the student's loss; returns (mean, |std|)."""
    student: Any = roles.student
    adam = torch.optim.Adam(student.parameters(), lr=lr)
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * (1 - step / steps)
        turn = turn_of(method.turns(roles, step), "student")
        adam.zero_grad()
        for losses in turn.losses(Batch(Scripted(script(), fold(step)), (1,))):
            losses.total().backward()
        adam.step()
    return torch.stack((student.mean.detach(), student.std.detach().abs()))


def endless(columns: tuple[Tensor, ...]) -> Any:
    return lambda: [columns[i % len(columns)] for i in range(8)]


@pytest.mark.parametrize(
    ("name", "method", "steps"),
    [
        ("dmd2", DMD2(gan=None, times=LEVELS), 250),
        ("vsd", VSD(times=LEVELS, weight="one"), 250),
        ("sid-0.5", SiD(alpha=0.5, times=LEVELS, normalize=False), 250),
        ("sid-1", SiD(alpha=1.0, times=LEVELS, normalize=False), 250),
        ("sid-1.2", SiD(alpha=1.2, times=LEVELS, normalize=False), 250),
        ("sim", SiD(alpha=1.0, huber=0.03, times=LEVELS), 250),
        ("f-distill-fkl", FDistill(divergence="fkl", times=LEVELS, bins=0, gan=FAINT), 250),
        # h = r / (1 + r) is at most 1 and small where the student has mass and the teacher none: slower.
        ("f-distill-js", FDistill(divergence="js", times=LEVELS, bins=0, gan=FAINT), 1000),
        ("uni-fkl", UniInstruct(divergence="fkl", times=LEVELS, gan=FAINT, normalize=False), 250),
        ("emd", EMD(times=LEVELS, langevin=2, weight="one"), 250),
        ("class-ratio", ClassRatio(divergence="rkl", times=LEVELS), 250),
    ],
)
def test_affine_student_reaches_the_teacher(name: str, method: Any, steps: int):
    # Pairs of normal quantiles: any draws will do, the gradient vanishes at the optimum for each of them.
    columns = midpoints(7)
    roles = players(mean=0.0, std=0.9)
    found = fit(method, roles, steps, 0.03, endless(columns))
    assert torch.allclose(found, torch.tensor([MEAN, STD], dtype=F64), atol=2e-3), (name, found)


class Ends(nn.Module):
    """Two affine experts: one makes x_s (s = 0.5) from noise, the other x0 from x_s, as denoisers."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.process = Flow()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=F64))
        self.std = nn.Parameter(torch.tensor(std, dtype=F64))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        # x_s = mean + std z with z = x at t = 1: x0 = (x_s - s eps) / (1 - s) and eps = z there.
        return from_x0(self.process, x, t, (self.mean + self.std * x - 0.5 * x) / 0.5)


def sub_interval_critic(student: Any, biased: bool) -> nn.Module:
    """The best affine denoiser at each t under the critic's own regression target, from the rows of `EXACT`."""
    flow = Flow()
    z, eps = EXACT

    class Fitted(nn.Module):
        process = flow

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
            with torch.no_grad():
                x_s = student.mean + student.std * z
                out = torch.empty_like(x)
                for level in t.unique():
                    many = level.expand(len(z))
                    s = torch.full_like(many, 0.5)
                    x_t, target = add_noise(flow, x_s, eps, many, s)
                    if biased:
                        target = x_s
                    a, y = x_t[:, 0], target[:, 0]
                    slope = ((a - a.mean()) * (y - y.mean())).sum() / ((a - a.mean()) ** 2).sum()
                    rows = t == level
                    out[rows] = y.mean() + slope * (x[rows] - a.mean())
            return from_x0(flow, x, t, out)

    return Fitted()


def pairs_of_nodes() -> tuple[Tensor, Tensor]:
    """Two columns (36, 1): Gauss and Hermite's three nodes as a multiset, whose plain mean is exact to degree five."""
    nodes = 3**0.5 * torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=F64)
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    return z.reshape(-1, 1), eps.reshape(-1, 1)


EXACT = pairs_of_nodes()
PHASE_ONE = Levels(at=(0.2, 0.4, 0.6, 0.8, 0.94))


class Everywhere(Scripted):
    """Rows that visit every level of PHASE_ONE once for every pair of nodes: an expectation without chance."""

    def integers(self, high: int) -> Tensor:
        return torch.arange(len(self)) % high


def naive_end() -> tuple[float, float]:
    """Where phase one stops if its critic regresses onto x_s as if it were clean.

    That critic is mu + k (x - a mu) with k = a b^2 / (a^2 b^2 + sigma_{t|s}^2), the teacher m + g (x - alpha m), and
    the weight w = alpha a / sigma^2. The mean of the gradient is zero at mu = m sum w (1 - g alpha) / sum w (1 - g a),
    its product with z where sum w a (k - g) = 0, which grows with b.
    """
    s = 0.5
    t = s + (1 - s) * torch.tensor(PHASE_ONE.at, dtype=F64)
    a, alpha = (1 - t) / (1 - s), 1 - t
    g, w = alpha * STD**2 / (alpha**2 * STD**2 + t**2), alpha * a / t**2
    mu = MEAN * (w * (1 - g * alpha)).sum() / (w * (1 - g * a)).sum()
    low, high = 0.0, 2.0
    for _ in range(60):
        b = (low + high) / 2
        k = a * b**2 / (a**2 * b**2 + t**2 - (a * s) ** 2)
        low, high = (low, b) if float((w * a * (k - g)).sum()) > 0 else (b, high)
    return float(mu), low


@pytest.mark.parametrize("biased", [False, True])
def test_first_phase_reaches_the_marginal_with_the_unbiased_target_only(biased: bool):
    # q_s must become N(alpha m, alpha^2 s^2 + sigma^2); the naive target has a resting place of its own.
    marginal, wrong = (0.35, 0.29**0.5), naive_end()
    assert wrong == pytest.approx((0.73913, 0.22492), abs=1e-5)
    count = len(PHASE_ONE.at)
    z, eps = (c.repeat_interleave(count, 0) for c in EXACT)
    method = PhasedDMD(times=PHASE_ONE, weight="kl", exit="last")

    def step_from(mean: float, std: float) -> tuple[Ends, Roles]:
        student = Ends(mean, std)
        critic = sub_interval_critic(student, biased)
        return student, Roles(teacher=gaussian(Flow(), MEAN, STD), student=student, critic=critic)

    def push(mean: float, std: float) -> float:
        _, roles = step_from(mean, std)
        return float(student_gradient(method, roles, Batch(Everywhere([z, eps]), (1,))).abs().max())

    here, there = (wrong, marginal) if biased else (marginal, wrong)
    assert push(*here) < 1e-9
    assert push(*there) > 0.02
    student, roles = step_from(0.1, 0.8)
    adam = torch.optim.Adam(student.parameters(), lr=0.03)
    for step in range(200):
        adam.param_groups[0]["lr"] = 0.03 * (1 - step / 200)
        adam.zero_grad()
        (losses,) = method.student_losses(roles, Batch(Everywhere([z, eps]), (1,)))
        losses.total().backward()
        adam.step()
    found = (float(student.mean.detach()), abs(float(student.std.detach())))
    assert found == pytest.approx(here, abs=2e-3)


def test_second_phase_reaches_clean_data_through_the_frozen_first_expert():
    first = Ends(0.35, 0.5385164807)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.process = Flow()
            self.second = Affine(Flow(), 0.0, 0.9)

        @property
        def mean(self) -> Tensor:
            return self.second.mean

        @property
        def std(self) -> Tensor:
            return self.second.std

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
            if float(t[0]) > 0.5:
                return first(x, t, cond)
            z = (x - 0.35) / 0.5385164807
            return from_x0(self.process, x, t, self.second.mean + self.second.std * z)

    from distribution_cases import Follow

    student = Both()
    roles = Roles(teacher=gaussian(Flow(), MEAN, STD), student=student, critic=Follow(student.second))
    method = PhasedDMD(phase=2, times=LEVELS)
    found = fit(method, roles, 250, 0.03, endless(midpoints(7)))
    assert torch.allclose(found, torch.tensor([MEAN, STD], dtype=F64), atol=2e-3)
    assert first.mean.grad is None


@pytest.mark.parametrize(("s", "t"), [(0.5, 0.8), (0.3, 0.35), (0.4, 0.6)])
def test_sub_interval_target_has_the_posterior_mean_and_the_naive_one_has_not(s: float, t: float):
    # x_s of the exact Gaussian: the regression on x_t must be the exact denoiser, slope and intercept.
    flow = Flow()
    z, eps = midpoints(200)
    a_s = 1 - s
    spread = ((a_s * STD) ** 2 + s**2) ** 0.5
    x_s = a_s * MEAN + spread * z
    times = torch.full((len(z),), t, dtype=F64)
    x_t, target = add_noise(flow, x_s, eps, times, torch.full_like(times, s))
    gain = (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)

    def slope(y: Tensor) -> float:
        a, b = x_t[:, 0] - x_t.mean(), y[:, 0] - y.mean()
        return float((a * b).sum() / (a**2).sum())

    # The midpoint grid has variance 0.9966 in each column; it cancels between numerator and denominator.
    assert abs(slope(target) - gain) < 1e-9
    assert abs(float(target.mean()) - MEAN) < 1e-9
    assert abs(slope(x_s) - gain) > 0.05
    assert abs(float(x_s.mean()) - MEAN) > 0.05
