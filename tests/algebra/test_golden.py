"""Numbers computed once, by hand-written fp64 programs independent of this package."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers_core import F64, Recorder, col
from scipy.optimize import brentq
from scipy.stats import norm

from fewstep.algebra.jump import solve, solver_step
from fewstep.algebra.noising import add_noise, transition
from fewstep.algebra.prediction import from_x0
from fewstep.algebra.process import EDM, VP, DiscreteVP, Flow, Process, Trig
from fewstep.networks.analytic import Mixture, flow_map, gaussian
from fewstep.networks.denoiser import Denoiser, Rescheduled
from fewstep.objectives.regression import dsm

M, S = 0.7, 0.4
MIX = ([0.3, 0.7], [[-1.2], [0.8]], [0.25, 0.35])
# A schedule that reaches sigma = 0 and has no clamp: t = sigma on [0, 80].
VE = EDM(sigma_min=0.0)


def printed(value: torch.Tensor | float, digits: str) -> None:
    """Agree to the last printed digit of the reference."""
    places = len(digits.split("e")[0].split(".")[1])
    exponent = int(digits.split("e")[1]) if "e" in digits else 0
    assert abs(float(value) - float(digits)) <= 0.5001 * 10.0 ** (exponent - places), (float(value), digits)


TEACHER = [
    # process, t, x, rho, D, eps, score, v, psi
    (Flow(), 0.6, 0.5, ".620966988", ".736514523", ".342323651", "-.570539419", "-.304979253", "-.394190871"),
    (EDM(), 1.5, 2.0, "1.55241747", ".786307054", ".809128631", "-.539419087", "-.37033195", ".022821577"),
    (
        DiscreteVP(),
        501.0,
        0.3,
        ".9667734",
        ".705001825",
        ".107631985",
        "-.112079969",
        "-.647002486",
        "-.59736984",
    ),
    (VP(), 0.5, 0.3, ".966222747", ".704971828", ".106052774", "-.110511447", "-.646708953", "-.598919054"),
]


@pytest.mark.parametrize("row", TEACHER, ids=["flow", "ve", "ddpm", "vp"])
def test_teacher_quantities(row: tuple) -> None:
    process, t, x, rho, d, eps, score, v, psi = row
    p = gaussian(process, M, S)(col(x)[:, None], col(t))
    a, s = process.alpha(col(t)), process.sigma(col(t))
    printed(torch.hypot(a * S, s), rho)
    for value, digits in [
        (p.x0, d),
        (p.eps, eps),
        (p.score(), score),
        (p.raw("score"), score),
        (p.raw("v"), v),
        (p.raw("psi"), psi),
    ]:
        printed(value, digits)
    if isinstance(process, Flow):
        printed(p.velocity(), psi)


def test_table_values() -> None:
    ddpm, sd = DiscreteVP(), DiscreteVP(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)

    def bar(p: Process, index: float) -> torch.Tensor:
        return p.alpha(col(index + 1.0)) ** 2

    def ratio(p: Process, index: float) -> torch.Tensor:
        return p.sigma(col(index + 1.0)) / p.alpha(col(index + 1.0))

    printed(bar(ddpm, 500), "0.07779665837")
    printed(bar(ddpm, 0), "0.9999")
    printed(bar(ddpm, 999), "4.0358e-5")
    printed(ratio(ddpm, 0), "0.0100")
    printed(ratio(ddpm, 999), "157.41")
    printed(bar(sd, 500), ".2763326838")
    printed(bar(sd, 0), "0.99915")
    printed(bar(sd, 999), "0.0046601")
    printed(bar(sd, 399), "0.42609")
    printed(ratio(sd, 0), "0.02917")
    printed(ratio(sd, 999), "14.6146")
    printed(VP().alpha(col(0.5)), ".2811828808")
    printed(VP().sigma(col(0.5)), ".9596542021")


def test_flow_maps_of_a_gaussian() -> None:
    x = col(0.5)[:, None]

    def phi(s: float) -> torch.Tensor:
        return flow_map(Flow(), M, S, x, col(0.6), col(s))

    printed(phi(0.2), ".6936931521")
    printed(phi(0.0), ".8417144578")
    printed((x - phi(0.2)) / 0.4, "-.4842328803")
    printed((x - phi(0.0)) / 0.6, "-.5695240963")
    net = gaussian(Flow(), M, S)
    for solver in ("euler", "ddim"):
        printed(solver_step(net, x, col(0.6), col(0.2), solver=solver), ".6576763485")


def test_ve_solver_steps() -> None:
    net, x = gaussian(VE, M, S), col(2.0)[:, None]
    printed(flow_map(VE, M, S, x, col(1.5), col(0.0)), "1.0349614457")
    printed(solver_step(net, x, col(1.5), col(0.5), solver="euler"), "1.1908713693")
    printed(solver_step(net, x, col(1.5), col(0.5), solver="ddim"), "1.1908713693")
    printed(solver_step(net, x, col(1.5), col(0.5), solver="heun"), "1.2961238741")
    printed(flow_map(VE, M, S, x, col(1.5), col(0.5)), "1.2361999379")


def test_free_flow_from_pure_noise() -> None:
    z = col(0.3)[:, None]
    f = flow_map(Flow(), M, S, z, col(1.0), col(0.5))
    printed(f, ".5115549442")
    printed((f - z) / 0.5, ".4231098884")


@pytest.mark.parametrize(("count", "digits"), [(3, "8.005443547e-4"), (18, ".00420761882"), (40, ".004637682257")])
def test_euler_chain_slope_on_the_karras_grid(count: int, digits: str) -> None:
    # The Euler chain is affine in its start: its slope is the fixed point of CD, KD and SFD with that teacher.
    process = EDM()
    times = process.grid(torch.linspace(1, 0, count, dtype=F64))
    ends = solve(gaussian(process, M, S), col(0.0, 1.0)[:, None], times, solver="ddim")
    printed(ends[1, 0] - ends[0, 0], digits)
    exact = flow_map(process, M, S, col(0.0, 1.0)[:, None], process.grid(col(1, 1)), process.grid(col(0, 0)))
    printed(exact[1, 0] - exact[0, 0], ".005000")


def test_progressive_distillation_target() -> None:
    net, x = gaussian(Flow(), M, S), col(0.5)[:, None]
    t, mid, s = col(0.8), col(0.6), col(0.4)
    z_mid = solver_step(net, x, t, mid)
    z_s = solver_step(net, z_mid, mid, s)
    k = 0.4 / 0.8
    target = (z_s - k * x) / (0.6 - k * 0.2)
    printed(z_mid, ".5544554455")
    printed(z_s, ".6181545540")
    printed(target, ".7363091081")
    printed(net(x, t).x0, ".7178217822")
    printed(flow_map(Flow(), M, S, x, t, s), ".6288725036")
    # One DDIM step with the target lands on the teacher's two steps.
    assert abs(float(from_x0(Flow(), x, t, target).at(s) - z_s)) < 1e-15


def test_trigflow_quantities() -> None:
    sd, t, x = 0.5, col(0.9), col(0.2)[:, None]
    p = gaussian(Trig(), M / sd, S / sd)(x / sd, t)
    printed(sd * torch.hypot(torch.cos(t) * S / sd, torch.sin(t)), ".4639225089")
    printed(sd * p.x0, ".5913450476")
    printed(p.raw("trig"), "-1.192409065")
    f = sd * flow_map(Trig(), M / sd, S / sd, x / sd, t, col(0.0))
    printed(f, ".4972704723")
    printed(from_x0(Trig(), x / sd, t, f / sd).raw("trig"), "-.9522166903")


@pytest.mark.parametrize(
    ("kind", "ramp", "digits"),
    [
        ("zero", 1.0, "-.3277575700"),
        ("zero", 0.0, "-.2303728069"),
        ("teacher", 1.0, "+.0988647999"),
        ("cm", 1.0, "0.0000000000"),
    ],
)
def test_scm_tangent(kind: str, ramp: float, digits: str) -> None:
    # g = -cos^2 t (sd F - dx/dt) - r cos t sin t (x + sd dF/dt), dF/dt along the teacher's ODE.
    sd, m, s = 0.5, M / 0.5, S / 0.5
    process = Trig()

    def student(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if kind == "zero":
            return 0 * x
        if kind == "teacher":
            return gaussian(process, m, s)(x / sd, t).raw("trig")
        f = flow_map(process, m, s, x / sd, t, torch.zeros_like(t))
        return from_x0(process, x / sd, t, f).raw("trig")

    t, x = col(0.9), col(0.2)[:, None]
    velocity = sd * gaussian(process, m, s)(x / sd, t).velocity()
    value, total = torch.func.jvp(student, (x, t), (velocity, torch.ones_like(t)))
    c, n = math.cos(0.9), math.sin(0.9)
    g = -(c**2) * (sd * value - velocity) - ramp * c * n * (x + sd * total)
    printed(g, digits)


def test_mixture_quantities() -> None:
    x = col(0.1)[:, None]
    flow = Mixture(Flow(), *MIX)
    p = flow(x, col(0.5))
    printed(torch.softmax(flow._logits(x, col(0.5), None)[0], 1)[0, 0], ".170536806")
    printed(p.x0, ".418658307")
    printed(p.score(), ".437316613")
    printed(p.eps, "-.218658307")
    printed(p.velocity(), "-.637316613")
    ve = Mixture(EDM(), *MIX)
    q = ve(x, col(1.0))
    printed(torch.softmax(ve._logits(x, col(1.0), None)[0], 1)[0, 0], ".198314487")
    printed(q.x0, ".357293906")
    printed(q.score(), ".257293906")


def _cdf(x: float, t: float) -> float:
    a = 1 - t
    return sum(w * norm.cdf((x - a * m[0]) / math.hypot(a * s, t)) for w, m, s in zip(*MIX, strict=True))


def test_mixture_flow_map_by_quantiles_and_by_the_ode() -> None:
    # In one dimension the probability-flow map keeps the quantile (algorithms 1.5).
    starts = [
        (0.9, 0.2, ".7097166769"),
        (0.9, -1.0, "-1.2421267699"),
        (1.0, 0.0, ".6019179123"),
        (1.0, 1.0, "1.0624732567"),
    ]
    levels = [_cdf(x, t) for t, x, _ in starts]
    for level, (_, _, digits) in zip(levels, starts, strict=True):
        printed(brentq(lambda y, level=level: _cdf(y, 0.0) - level, -4, 4, xtol=1e-14), digits)
    # The same map by integrating the package's velocity with Runge and Kutta's fourth order.
    net, end, steps = Mixture(Flow(), *MIX), 1e-6, 200
    first = col(*(t for t, _, _ in starts))
    y = col(*(x for _, x, _ in starts))[:, None]
    h = (end - first) / steps

    def f(y: torch.Tensor, k: float) -> torch.Tensor:
        return h[:, None] * net(y, first + k * h).velocity()

    for k in range(steps):
        k1 = f(y, k)
        k2 = f(y + k1 / 2, k + 0.5)
        k3 = f(y + k2 / 2, k + 0.5)
        y = y + (k1 + 2 * k2 + 2 * k3 + f(y + k3, k + 1)) / 6
    exact = [brentq(lambda z, level=level: _cdf(z, end) - level, -4, 4, xtol=1e-14) for level in levels]
    assert torch.allclose(y[:, 0], col(*exact), rtol=0, atol=1e-8)


def test_dynamic_shift_lists() -> None:
    from fewstep.algebra.times import shift

    for factor, expected in ((5.0, (0.9375, 0.8333333333, 0.625)), (3.0, (0.9, 0.75, 0.5))):
        assert torch.allclose(shift(col(0.75, 0.5, 0.25), factor), col(*expected), atol=1e-10, rtol=0)
    warped = 1000 * shift(col(1.0, 0.75, 0.5, 0.25, 0.1), 5.0)
    for value, digits in zip(warped, ("1000.00", "937.50", "833.33", "625.00", "357.14"), strict=True):
        printed(value, digits)


def test_phased_coefficients() -> None:
    t, s = col(0.8), col(0.5)
    alpha_ts, sigma_ts = transition(Flow(), s, t)
    printed(alpha_ts, ".400000000000")
    printed(sigma_ts, ".7745966692")
    one = torch.ones(1, 1, dtype=F64)
    # add_noise is affine in (x_s, eps): its coefficients are read off one at a time.
    x_t, of_eps = add_noise(Flow(), 0 * one, one, t, s)
    printed(x_t, ".7745966692")
    printed(-of_eps, ".2581988897")
    x_t, of_x = add_noise(Flow(), one, 0 * one, t, s)
    printed(x_t, ".400000000000")
    assert float(of_x) == pytest.approx(1 / 0.5, abs=1e-15)
    # The same target in eps and psi form: eps = (x_t - alpha x0) / sigma, psi = eps - x0.
    x_t, target = add_noise(Flow(), 0 * one, one, t, s)
    p = from_x0(Flow(), x_t, t, target)
    printed(p.eps, "1.0327955590")
    printed(p.raw("psi"), "1.2909944487")
    # dKL/dx_s = alpha_{t|s} (s_q - s_p), and s_q - s_p = (D_q - D_p) alpha / sigma^2.
    psi_per_x0 = (0.2 + 0.8) / 0.8
    weight = alpha_ts * (0.2 / 0.8**2) / psi_per_x0
    printed(weight, ".100000000000")


def test_phased_loss_is_the_clamped_psi_form() -> None:
    # L = min(1/sigma_ts^2, 10) |sigma_ts psi_F - ((alpha_s^2 sigma_t + alpha_t sigma_s^2)/alpha_s^2 eps
    #     - sigma_ts x_s/alpha_s)|^2 (algorithms A2, step 4), for an arbitrary network.
    b, c, h, w = 3, 2, 4, 5
    g = torch.Generator().manual_seed(0)
    x_s, eps = (torch.randn(b, c, h, w, generator=g, dtype=F64) for _ in range(2))
    for t, s in ((col(0.8, 0.7, 0.95), col(0.5, 0.3, 0.9)), (col(0.5005, 0.31, 1.0), col(0.5, 0.3, 0.2))):
        net = Denoiser(Recorder(lambda x, time, cond: torch.sin(2 * x)), Flow(), "psi", "t")
        a_s, s_s, a_t, s_t = 1 - s, s, 1 - t, t
        s_ts = torch.sqrt(s_t**2 - (a_t / a_s) ** 2 * s_s**2)
        shape = (b, 1, 1, 1)
        x_t = (a_t / a_s).view(shape) * x_s + s_ts.view(shape) * eps
        psi = torch.sin(2 * x_t)
        gain = (a_s**2 * s_t + a_t * s_s**2) / a_s**2
        want = s_ts.view(shape) * psi - (gain.view(shape) * eps - (s_ts / a_s).view(shape) * x_s)
        loss = ((want**2).mean((1, 2, 3)) * torch.clamp(1 / s_ts**2, max=10)).mean()
        got = dsm(net, x_s, t, eps, s=s)
        assert float(got) == pytest.approx(float(loss), rel=1e-10)


def test_karras_grid_is_the_published_formula() -> None:
    n, rho = 18, 7
    i = np.arange(n)
    sigma = (80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    got = EDM().grid(torch.linspace(1, 0, n, dtype=F64))
    assert np.allclose(got.numpy(), sigma, rtol=1e-13, atol=0)
    assert float(got[0]) == 80.0
    assert float(got[-1]) == 0.002


def test_dmd2_noise_range() -> None:
    from fewstep.algebra.times import Index

    class Ends:
        """Draws that give the smallest or the largest index."""

        def __init__(self, high: bool) -> None:
            self.high = high

        def integers(self, high: int) -> torch.Tensor:
            return torch.tensor([high - 1 if self.high else 0])

    printed(Index().sample(Ends(False), EDM()), "0.00323")
    printed(Index().sample(Ends(True), EDM()), "72.05")


def test_matched_snr_reproduces_the_ve_denoiser() -> None:
    # A DDPM teacher re-expressed in VE is the VE teacher: y = x / alpha at level sigma / alpha.
    index = 501.0
    p = DiscreteVP()
    sigma = p.sigma(col(index)) / p.alpha(col(index))
    ve = Rescheduled(gaussian(p, M, S), EDM())
    x = col(0.3)[:, None]
    printed(ve(x / p.alpha(col(index))[:, None], sigma).x0, ".705001825")
