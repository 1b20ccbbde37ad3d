"""Phased DMD inside an interval: its critic's own loss, once minimised, leaves the exact experts at rest."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from distribution_cases import F64, MEAN, STD, Scripted, batch64, gradient_of, student_gradient
from listening import Listening, batch_of
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.noising import add_noise
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import Flow
from fewstep.algebra.times import Levels, Uniform
from fewstep.methods.critic import Critic
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.networks.analytic import Mixture, gaussian
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles
from fewstep.networks.routed import ByTime, Routed
from fewstep.objectives import mse

FLOW = Flow()
# Levels that float32 does not hold: a path in single precision would miss s by 1e-8.
STEPS = (1.0, 0.7, 0.4)


def marginal(level: float) -> tuple[float, float]:
    """Mean and standard deviation of the teacher's samples at a level of the flow."""
    return (1 - level) * MEAN, (((1 - level) * STD) ** 2 + level**2) ** 0.5


def jump_to(x: Tensor, t: Tensor, x_s: Tensor, s: float) -> Prediction:
    """The denoiser's answer at (x, t) from which a straight flow step ends at x_s."""
    share = (s / t).to(x.dtype)[:, None]
    return from_x0(FLOW, x, t, (x_s - share * x) / (1 - share))


class Expert(nn.Module):
    """Takes the teacher's samples at level `start` to mean + std z at level `end`, z their standardised value."""

    def __init__(self, start: float, end: float) -> None:
        super().__init__()
        self.process = FLOW
        self.start, self.end = marginal(start), end
        mean, std = marginal(end)
        self.mean = nn.Parameter(torch.tensor(mean, dtype=F64))
        self.std = nn.Parameter(torch.tensor(std, dtype=F64))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        z = (x - self.start[0]) / self.start[1]
        return jump_to(x, t, self.mean + self.std * z, self.end)


class Line(nn.Module):
    """x0 = a + b x: the family that holds the exact denoiser of a Gaussian at one level."""

    def __init__(self) -> None:
        super().__init__()
        self.process = FLOW
        self.w = nn.Parameter(torch.zeros(2, dtype=F64))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        return from_x0(FLOW, x, t, self.w[0] + self.w[1] * x)


def minimise(method: PhasedDMD, roles: Roles) -> None:
    """Put the critic, a `Line`, at the least value of the method's critic loss: one Newton step of a quadratic."""
    # Gauss and Hermite's three nodes as a multiset: a plain mean over all pairs is the exact expectation.
    nodes = 3**0.5 * torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=F64)
    z, eps = (c.reshape(-1, 1) for c in torch.meshgrid(nodes, nodes, indexing="ij"))

    def slope(*w: float) -> Tensor:
        roles.critic.w.data = torch.tensor(w, dtype=F64)
        return gradient_of(method, roles, Batch(Scripted([z, eps]), (1,)), "critic")

    at_zero = slope(0, 0)
    curvature = torch.stack((slope(1, 0) - at_zero, slope(0, 1) - at_zero), 1)
    roles.critic.w.data = -torch.linalg.solve(curvature, at_zero)


@pytest.mark.parametrize("level", [0.15, 0.8])
@pytest.mark.parametrize(
    "setting", [{}, {"weight": "kl"}, {"loss_on": "x0"}, {"clamp": 0.7}], ids=["dmd", "kl", "x0", "clamp"]
)
@pytest.mark.parametrize("phase", [1, 2, 3])
def test_exact_experts_rest_at_the_critic_that_the_methods_loss_leads_to(
    phase: int, setting: dict[str, Any], level: float
):
    ends = (*STEPS[1:], 0.0)
    experts = [Expert(a, b) for a, b in zip(STEPS, ends, strict=True)]
    student = Routed(experts, ByTime(FLOW, STEPS[1:]))
    roles = Roles(teacher=gaussian(FLOW, MEAN, STD), student=student, critic=Line())
    at = Levels(at=(level,))
    method = PhasedDMD(
        steps=STEPS,
        boundaries=STEPS[1:],
        phase=phase,
        times=at,
        critic=Critic(times=at),
        exit="last",
        **setting,
    )
    minimise(method, roles)
    s = method.end
    t = torch.full((3,), s + (1 - s) * level, dtype=F64)
    x = torch.tensor([[-1.5], [0.2], [1.1]], dtype=F64)
    assert torch.allclose(roles.critic(x, t).x0, roles.teacher(x, t).x0, rtol=1e-10, atol=1e-12)
    assert student_gradient(method, roles, batch64()).abs().max() < 1e-9
    # Elsewhere the same steps move both parameters of this phase's expert and nothing else.
    with torch.no_grad():
        experts[phase - 1].mean += 0.3
        experts[phase - 1].std *= 1.4
    minimise(method, roles)
    moved = student_gradient(method, roles, batch64()).reshape(3, 2)
    assert moved[phase - 1].abs().min() > 1e-4
    assert moved.count_nonzero() == 2


POINTS = Mixture(FLOW, [1.0] * 4, [[-1.0], [0.0], [1.0], [2.0]], [0.0] * 4)
"""The data of the paper's one-dimensional example: four equally likely points."""


class Transport(nn.Module):
    """Noise to exact samples of POINTS at level 0.5, by matching quantiles: a first expert that is at its optimum."""

    def __init__(self) -> None:
        super().__init__()
        self.process = FLOW
        self.x = torch.linspace(-3, 4, 7001, dtype=F64)
        spread = (self.x[:, None] - 0.5 * POINTS.means[:, 0]) / 0.5
        self.below = torch.special.ndtr(spread).mean(1)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        p = torch.special.ndtr(x[:, 0].double())
        k = torch.searchsorted(self.below, p).clamp(1, len(self.x) - 1)
        share = (p - self.below[k - 1]) / (self.below[k] - self.below[k - 1])
        x_s = self.x[k - 1] + share * (self.x[k] - self.x[k - 1])
        return jump_to(x, t, x_s[:, None].to(x.dtype), 0.5)


def learned(naive: bool) -> Denoiser:
    """A four-layer network trained on levels in (0.5, 1] only, by the method's critic turn or on the naive target."""
    torch.manual_seed(0)
    critic = Denoiser(MLP(1, 32, 4, frequencies=4), FLOW, "psi", "angle")
    roles = Roles(teacher=POINTS, student=Transport(), critic=critic)
    method = PhasedDMD(critic=Critic(times=Uniform(low=0.02, high=1.0)))
    adam = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for step in range(250):
        adam.param_groups[0]["lr"] = 1e-2 * (1 - step / 250)
        batch = Batch(Draws(fold("phase", step), torch.arange(256)), (1,))
        if naive:
            x_s, _ = method.path(roles, batch, grad=False)
            t, s = method.level(roles, batch, method.critic.times)
            x_t, _ = add_noise(FLOW, x_s, batch.noise(), t, s)
            loss = mse(critic(x_t, t).x0, x_s)
        else:
            (losses,) = method.critic_losses(roles, batch)
            loss = losses.total()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return critic


@torch.no_grad()
def trajectories(denoiser: nn.Module) -> Tensor:
    """Ends at level 0.5 of 24 Euler steps of the flow from 61 quantiles of the prior."""
    q = (torch.arange(61) + 0.5) / 61
    x = torch.special.ndtri(q)[:, None]
    times = torch.linspace(1, 0.5, 25, dtype=F64)
    for a, b in pairwise(times):
        x = denoiser(x, a.expand(61)).at(b.expand(61)).to(x.dtype)
    return x[:, 0]


def test_a_network_trained_inside_the_interval_follows_the_full_flow_with_the_unbiased_target_only():
    exact = trajectories(POINTS)
    # The exact ends are the data at this level: mean 0.25, variance (1.25 + 1) / 4, quantiles and Euler aside.
    assert float(exact.mean()) == pytest.approx(0.25, abs=1e-3)
    assert float(exact.var(unbiased=False)) == pytest.approx(0.5625, abs=0.03)
    unbiased = (trajectories(learned(naive=False)) - exact).pow(2).mean().sqrt()
    biased = (trajectories(learned(naive=True)) - exact).pow(2).mean().sqrt()
    assert unbiased < 0.04
    assert biased > 0.1


@pytest.mark.parametrize(("phase", "levels"), [(1, [1.0, 0.75]), (2, [0.5, 0.25])])
def test_every_step_of_a_phase_carries_the_gradient_as_often(phase: int, levels: list[float]):
    roles = Roles(student=Listening(FLOW, 0.3, 0.1))
    method = PhasedDMD(steps=(1.0, 0.75, 0.5, 0.25), boundaries=(0.5,), phase=phase)
    met = []
    for key in range(200):
        method.path(roles, batch_of(2, key=key))
        met.append(float(roles.student.times[-1][0]))
        # The way there has none.
        assert roles.student.graphs[-1]
        assert not any(roles.student.graphs[:-1])
        roles.student.times.clear()
        roles.student.graphs.clear()
    assert set(met) == set(levels)
    assert abs(met.count(levels[0]) - 100) <= 4 * 50**0.5
