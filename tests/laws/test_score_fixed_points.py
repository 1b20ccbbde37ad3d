"""Distribution matching: gradients are those of a divergence, and students stop where they should."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers_core import F64, PROCESSES, col, gaussian_kl, inner_times, normal_nodes
from torch import nn

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.noising import add_noise, transition
from fewstep.algebra.prediction import Prediction, from_raw, from_x0
from fewstep.algebra.process import EDM, Flow, Process
from fewstep.algebra.times import Uniform
from fewstep.methods.dmd2 import DMD2
from fewstep.networks.analytic import Mixture, gaussian
from fewstep.networks.roles import Roles

M, S = 0.7, 0.4


class Affine(nn.Module):
    """x0 = mu + b z for a start noise z scaled to the prior."""

    def __init__(self, process: Process, mu: float, b: float, dim: int = 1) -> None:
        super().__init__()
        self.process = process
        self.mu = nn.Parameter(torch.full((dim,), mu, dtype=F64))
        self.b = nn.Parameter(torch.tensor(b, dtype=F64))

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None, **call: Any) -> Prediction:
        z = x.double() / self.process.prior(torch.ones_like(x), t)
        return from_x0(self.process, x.double(), t, self.mu + self.b * z)


class Tracking(nn.Module):
    """The exact critic of an affine student: the denoiser of N(mu, b^2) at its present mu and b."""

    def __init__(self, student: Affine) -> None:
        super().__init__()
        self._student = (student,)
        self.process = student.process

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None, **call: Any) -> Prediction:
        s = self._student[0]
        return normal(self.process, x, t, s.mu.detach(), s.b.detach())


def normal(process: Process, x: torch.Tensor, t: torch.Tensor, mu: torch.Tensor, b: torch.Tensor) -> Prediction:
    """The exact denoiser of N(mu, b^2), from its definition."""
    a, n = process.alpha(t)[:, None], process.sigma(t)[:, None]
    return from_x0(process, x, t, mu + a * b**2 / (a**2 * b**2 + n**2) * (x - a * mu))


def plane(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nodes (z, eps) as columns and the weights of an expectation over two standard normals."""
    nodes, weights = normal_nodes(count)
    z, e = torch.meshgrid(nodes, nodes, indexing="ij")
    return z.reshape(-1, 1), e.reshape(-1, 1), torch.outer(weights, weights).reshape(-1)


@pytest.mark.parametrize(
    ("sigma", "kl", "d_mu", "d_b", "fisher"),
    [
        (0.5, "5.1692263061", "-4.1463414634", "3.0585365854", "27.5861986913"),
        (2.0, ".3950244976", "-.4086538462", ".1205769231", ".2073835059"),
    ],
)
def test_golden_divergences_in_ve(sigma: float, kl: str, d_mu: str, d_b: str, fisher: str) -> None:
    p, t = EDM(), col(sigma)
    mu, b = torch.tensor(-1.0, dtype=F64), torch.tensor(1.5, dtype=F64)
    z, e, w = plane(12)
    x_t = mu + b * z + sigma * e
    rows = t.expand(len(z))
    fake, real = normal(p, x_t, rows, mu, b), gaussian(p, M, S)(x_t, rows)
    value = gaussian_kl(mu, b**2 + sigma**2, torch.tensor(M, dtype=F64), torch.tensor(S**2 + sigma**2, dtype=F64))
    assert float(value) == pytest.approx(float(kl), abs=6e-11)
    g = obj.score_difference(fake, real)[:, 0] / sigma**2
    assert float((w * g).sum()) == pytest.approx(float(d_mu), abs=6e-11)
    assert float((w * g * z[:, 0]).sum()) == pytest.approx(float(d_b), abs=6e-11)
    difference = (fake.score() - real.score())[:, 0]
    assert float((w * difference**2).sum()) == pytest.approx(float(fisher), abs=6e-11)
    # SiD at the exact critic: E[(D_T - D_F)(D_T - x_g) - alpha (D_T - D_F)^2] = (1 - alpha) sigma^4 Fisher.
    gap = (real.x0 - fake.x0)[:, 0]
    for alpha in (0.5, 1.0, 1.2):
        loss = w * gap * ((real.x0 - (mu + b * z))[:, 0] - alpha * gap)
        assert float(loss.sum()) == pytest.approx((1 - alpha) * sigma**4 * float(fisher), abs=1e-9)
    if sigma == 0.5:
        assert sigma**4 * float(fisher) == pytest.approx(1.7241374182, abs=6e-11)


@pytest.mark.parametrize("name", ["flow", "edm", "trig", "vp", "ddpm"])
def test_gradient_is_that_of_kl_for_a_mixture_teacher(name: str) -> None:
    # d KL(q_t || p_t) / d(mu, b), the KL by quadrature of its definition and differentiated by autograd.
    p = PROCESSES[name]
    teacher = Mixture(p, [0.3, 0.7], [[-1.2], [0.8]], [0.25, 0.35])
    for t in inner_times(p, 3, 0.3, 0.8):
        t = t[None]
        a, n = float(p.alpha(t)), float(p.sigma(t))
        mu = torch.tensor(-0.3, dtype=F64, requires_grad=True)
        b = torch.tensor(0.9, dtype=F64, requires_grad=True)
        std = torch.sqrt(a**2 * b**2 + n**2)
        u = torch.linspace(-12, 12, 6001, dtype=F64)
        x = (a * mu + std * u)[:, None]
        density = torch.exp(-0.5 * u**2) / math.sqrt(2 * math.pi) * (u[1] - u[0])
        log_q = -0.5 * u**2 - 0.5 * math.log(2 * math.pi) - torch.log(std)
        kl = (density * (log_q - teacher.log_prob(x, t.expand(len(u))))).sum()
        want = torch.autograd.grad(kl, (mu, b))
        z, e, w = plane(100)
        x_g = mu + b * z
        rows = t.expand(len(z))
        x_t, _ = add_noise(p, x_g.detach(), e, rows)
        g = obj.score_difference(normal(p, x_t, rows, mu.detach(), b.detach()), teacher(x_t, rows))
        # `surrogate_loss` gives g / numel; the weights of the quadrature stand where the mean's 1 / n would.
        loss = obj.surrogate_loss(x_g, g * (a / n) ** 2 * w[:, None] * len(w))
        got = torch.autograd.grad(loss, (mu, b))
        assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-6, abs=1e-7)
        assert float(got[1]) == pytest.approx(float(want[1]), rel=1e-6, abs=1e-7)


def test_velocity_form_of_the_difference() -> None:
    # D_fake - D_real = sigma / (alpha + sigma) (psi_real - psi_fake); on a flow t (v_real - v_fake).
    x = torch.randn(3, 2, dtype=F64)
    for p in PROCESSES.values():
        t = inner_times(p, 3, 0.2, 0.9)
        fake, real = from_x0(p, x, t, torch.sin(x)), from_x0(p, x, t, torch.cos(x))
        a, n = p.alpha(t)[:, None], p.sigma(t)[:, None]
        want = n / (a + n) * (real.raw("psi") - fake.raw("psi"))
        assert torch.allclose(obj.score_difference(fake, real), want, rtol=1e-8, atol=1e-10)


def roles_of(student: Affine, teacher: nn.Module) -> Roles:
    return Roles(teacher=teacher, student=student, critic=Tracking(student))


@pytest.mark.parametrize("name", ["flow", "edm", "ddpm"])
@pytest.mark.parametrize("steps", [(1.0,), (1.0, 0.5)])
def test_gradient_vanishes_pointwise_at_the_optimum(name: str, steps: tuple[float, ...]) -> None:
    p = PROCESSES[name]
    student = Affine(p, M, S, dim=3)
    method = DMD2(steps=steps, gan=None)
    batch = Batch(Draws(3, torch.arange(64)), (3,))
    x = M + S * batch.noise().double()
    g = method.gradient(roles_of(student, gaussian(p, M, S, dim=3)), batch, x)
    assert float(g.abs().max()) < 1e-9
    moved = Affine(p, M + 0.3, S, dim=3)
    g = method.gradient(roles_of(moved, gaussian(p, M, S, dim=3)), batch, x)
    assert float(g.abs().mean()) > 1e-2


def test_method_gradient_is_the_published_formula() -> None:
    # g = (D_fake - D_real) / <|x - D_real|>, real guided, fake not (DMD eq. 7 and 8; DMD2).
    p = Flow()
    teacher = Mixture(p, [0.5, 0.5], [[-1.0, 0.5], [1.0, -0.2]], [0.4, 0.3], [0, 1])
    student = Affine(p, 0.1, 0.8, dim=2)
    roles = roles_of(student, teacher)
    cond, null = torch.tensor([0, 1, 1, 0, 1]), torch.full((5,), 2)
    times = Uniform(low=0.02, high=0.98)
    draws = Draws(8, torch.arange(5))
    tau = times.sample(draws, p)
    eps = draws.normal(2)
    x = torch.randn(5, 2, dtype=F64)
    x_tau = (1 - tau)[:, None] * x + tau[:, None] * eps
    c, u = teacher(x_tau, tau, cond).x0, teacher(x_tau, tau, null).x0
    for w in (1.0, 3.0):
        real = u + w * (c - u)
        want = (roles.critic(x_tau, tau).x0 - real) / (x - real).abs().mean(1, keepdim=True)
        batch = Batch(Draws(8, torch.arange(5)), (2,), cond=cond, null_cond=null)
        got = DMD2(guidance=w, gan=None).gradient(roles, batch, x)
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)


def test_affine_student_descends_the_kl_to_the_teacher() -> None:
    # From N(-1, 1.5^2) to N(0.7, 0.4^2), exact critic, levels .05 .. 5, expectation by quadrature.
    p, teacher = EDM(), gaussian(EDM(), M, S)
    student = Affine(p, -1.0, 1.5)
    critic = Tracking(student)
    z, e, w = plane(3)
    levels = col(0.05, 0.2, 0.5, 1.0, 2.0, 5.0)
    zz, ee, ww = (v.repeat(6, *([1] * (v.ndim - 1))) for v in (z, e, w))
    t = levels.repeat_interleave(len(z))
    weight = (ww / 6 / t**2)[:, None] * len(t)
    sgd = torch.optim.SGD(student.parameters(), lr=0.1)
    start = torch.full_like(t, 80.0)
    for _ in range(120):
        x = student(80 * zz, start).x0
        x_t, _ = add_noise(p, x.detach(), ee, t)
        with torch.no_grad():
            g = obj.score_difference(critic(x_t, t), teacher(x_t, t)) * weight
        sgd.zero_grad()
        obj.surrogate_loss(x, g).backward()
        sgd.step()
    assert abs(float(student.mu.detach()) - M) < 1e-7
    assert abs(float(student.b.detach().abs()) - S) < 1e-7


@pytest.mark.parametrize("name", ["flow", "edm"])
def test_the_method_itself_brings_the_student_to_the_teacher(name: str) -> None:
    # The gradient is zero pointwise at the optimum, so random batches and the normaliser do not blur it.
    p = PROCESSES[name]
    student = Affine(p, -1.0, 1.5, dim=16)
    roles = roles_of(student, gaussian(p, M, S, dim=16))
    method = DMD2(gan=None)
    adam = torch.optim.Adam(student.parameters(), lr=0.05, betas=(0.5, 0.99))
    for step in range(240):
        adam.param_groups[0]["lr"] = 0.05 * min(1.0, 0.95 ** (step - 120))
        batch = Batch(Draws(fold(0, step), torch.arange(32)), (16,))
        (losses,) = method.student_losses(roles, batch)
        adam.zero_grad()
        losses.total().backward()
        adam.step()
    assert float((student.mu - M).abs().max()) < 3e-3
    assert abs(float(student.b.detach().abs()) - S) < 3e-3


@pytest.mark.parametrize(
    ("s", "levels", "mean", "std"),
    [(0.5, (0.6, 0.7, 0.8, 0.9, 0.97), 0.35, 0.53852), (None, (0.1, 0.3, 0.5, 0.7, 0.9), 0.7, 0.4)],
)
def test_phases_stop_at_the_teachers_marginal(
    s: float | None, levels: tuple[float, ...], mean: float, std: float
) -> None:
    # A phase's output is x_s; its critic is the exact score of the noised output (algorithms A2).
    p, teacher = Flow(), gaussian(Flow(), M, S)
    a = torch.tensor([-1.0, 1.5], dtype=F64)
    z, e, w = plane(3)
    t = col(*levels).repeat_interleave(len(z))
    z, e = z.repeat(len(levels), 1), e.repeat(len(levels), 1)
    w = w.repeat(len(levels))[:, None] / len(levels)
    at = None if s is None else torch.full_like(t, s)
    alpha_ts, sigma_ts = (v[:, None] for v in transition(p, at, t))
    scale = w * alpha_ts * (p.alpha(t) / p.sigma(t) ** 2)[:, None]
    for _ in range(160):
        x_t, _ = add_noise(p, a[0] + a[1] * z, e, t, at)
        var = alpha_ts**2 * a[1] ** 2 + sigma_ts**2
        fake = from_raw(p, "score", x_t, t, -(x_t - alpha_ts * a[0]) / var)
        g = scale * obj.score_difference(fake, teacher(x_t, t))
        a = a - 0.3 * torch.stack((g.sum(), (g * z).sum()))
    assert float(a[0]) == pytest.approx(mean, abs=1e-6)
    assert float(a[1].abs()) == pytest.approx(std, abs=5e-6)
