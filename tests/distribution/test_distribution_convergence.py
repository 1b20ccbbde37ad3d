"""Affine students reach N(0.7, 0.4^2) from N(0, 0.9^2) by the methods' own losses; phased experts their marginals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distribution_cases import F64, MEAN, STD, Affine, Scripted, midpoints, players, turn_of
from torch import Tensor, nn

from fewstep.methods.base import Batch
from fewstep.methods.class_ratio import ClassRatio
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.emd import EMD
from fewstep.methods.f_distill import FDistill
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.methods.sid import SiD
from fewstep.methods.terms import Gan
from fewstep.methods.uni_instruct import UniInstruct
from fewstep.methods.vsd import VSD
from fewstep.networks.analytic import gaussian
from fewstep.prediction import Prediction, from_x0
from fewstep.process import Flow, add_noise
from fewstep.random import fold
from fewstep.roles import Roles
from fewstep.times import Levels

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
    ("name", "method"),
    [
        ("dmd2", DMD2(gan_weight=0.0, times=LEVELS)),
        ("vsd", VSD(times=LEVELS, weight="one")),
        ("sid-0.5", SiD(alpha=0.5, times=LEVELS, normalize=False)),
        ("sid-1", SiD(alpha=1.0, times=LEVELS, normalize=False)),
        ("sid-1.2", SiD(alpha=1.2, times=LEVELS, normalize=False)),
        ("sim", SiD(alpha=1.0, huber=0.03, times=LEVELS)),
        ("f-distill-fkl", FDistill(divergence="fkl", times=LEVELS, bins=0, gan=FAINT)),
        ("uni-fkl", UniInstruct(divergence="fkl", times=LEVELS, gan=FAINT, normalize=False)),
        ("emd", EMD(times=LEVELS, langevin=2, weight="one")),
        ("class-ratio", ClassRatio(divergence="rkl", times=LEVELS)),
    ],
)
def test_affine_student_reaches_the_teacher(name: str, method: Any):
    # Pairs of normal quantiles: any draws will do, the gradient vanishes at the optimum for each of them.
    columns = midpoints(7)
    roles = players(mean=0.0, std=0.9)
    found = fit(method, roles, 250, 0.03, endless(columns))
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
    """The best affine denoiser at each t under the critic's own regression target, from 24 x 24 quantiles."""
    flow = Flow()
    z, eps = midpoints(24)

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


PHASE_ONE = Levels(at=(0.2, 0.4, 0.6, 0.8, 0.94))


@pytest.mark.parametrize("biased", [False, True])
def test_first_phase_reaches_the_marginal_with_the_unbiased_target_only(biased: bool):
    # q_s must become N(alpha m, alpha^2 s^2 + sigma^2) = (0.35, 0.53852); the sample variance of the quantile
    # grid stands in the critic and in the student alike, so it does not move the fixed point by more than 1 %.
    student = Ends(0.1, 0.8)
    roles = Roles(
        teacher=gaussian(Flow(), MEAN, STD), student=student, critic=sub_interval_critic(student, biased)
    )
    method = PhasedDMD(times=PHASE_ONE, weight="kl", exit="last")
    found = fit(method, roles, 150, 0.03, endless(midpoints(24)))
    gap = (found - torch.tensor([0.35, 0.53852], dtype=F64)).abs().max()
    if biased:
        assert gap > 0.05
    else:
        assert gap < 0.01


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
