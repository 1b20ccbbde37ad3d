"""Processes: derivatives, grids, angles, ends, transitions, and the unbiased sub-interval target."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers_core import F64, PROCESSES, col, inner_times
from scipy.integrate import quad

from fewstep.algebra.noising import add_noise, angle_of, transition
from fewstep.algebra.process import (
    EDM,
    VP,
    Cosine,
    DiscreteVP,
    Flow,
    ShiftedFlow,
    Trig,
    bc,
)
from fewstep.networks.analytic import Mixture

MIX = ([0.3, 0.7], [[-1.2], [0.8]], [0.25, 0.35])


@pytest.mark.parametrize("name", PROCESSES)
def test_derivatives_are_the_derivatives(name: str) -> None:
    p = PROCESSES[name]
    t = inner_times(p, 9)
    for f, df in ((p.alpha, p.dalpha), (p.sigma, p.dsigma)):
        _, tangent = torch.func.jvp(f, (t,), (torch.ones_like(t),))
        assert torch.allclose(df(t), tangent, rtol=1e-9, atol=1e-13)


def test_derivatives_in_every_segment_of_a_table() -> None:
    p = DiscreteVP(steps=7, beta_start=0.05, beta_end=0.4)
    t = torch.arange(0.25, 7, 0.5, dtype=F64)
    for f, df in ((p.alpha, p.dalpha), (p.sigma, p.dsigma)):
        numeric = (f(t + 1e-6) - f(t - 1e-6)) / 2e-6
        assert torch.allclose(df(t), numeric, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_schedule_is_monotone_keeps_shape_and_dtype(name: str) -> None:
    p = PROCESSES[name]
    t = p.grid(torch.linspace(0.001, 1, 400, dtype=F64))
    assert bool((angle_of(p, t).diff() > 0).all())
    assert bool((t.diff() > 0).all())
    for dtype in (torch.float32, F64):
        for f in (p.alpha, p.sigma, p.dalpha, p.dsigma, p.grid, p.t_of_angle):
            out = f(torch.full((2, 3), 0.25, dtype=dtype))
            assert out.dtype is dtype
            assert out.shape == (2, 3)


@pytest.mark.parametrize("name", PROCESSES)
def test_grid_ends_and_inverse_angle(name: str) -> None:
    p = PROCESSES[name]
    assert float(p.grid(col(1.0))) == p.t_max
    t = p.grid(torch.linspace(0.0005, 1, 300, dtype=F64))
    assert torch.allclose(p.t_of_angle(angle_of(p, t)), t, rtol=1e-9, atol=1e-12 * p.t_max)
    # Beyond either end the answer is the end itself, finite.
    beyond = p.t_of_angle(col(0.0, math.pi / 2))
    assert torch.isfinite(beyond).all()
    assert float(beyond[1]) == pytest.approx(p.t_max, rel=1e-9)
    assert float(beyond[0]) == pytest.approx(float(p.grid(col(0.0))), abs=1e-12 * p.t_max)


@pytest.mark.parametrize("name", [*PROCESSES, "shifted"])
def test_level_is_the_inverse_of_the_grid(name: str) -> None:
    p = ShiftedFlow(shift=3.0) if name == "shifted" else PROCESSES[name]
    u = torch.linspace(0, 1, 41, dtype=F64)
    assert torch.allclose(p.level(p.grid(u)), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["trig", "cosine", "vp", "ddpm", "sd"])
def test_variance_is_preserved(name: str) -> None:
    p = PROCESSES[name]
    t = p.grid(torch.linspace(0, 1, 101, dtype=F64))
    assert torch.allclose(p.alpha(t) ** 2 + p.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)


def test_exact_ends() -> None:
    for dtype in (torch.float32, F64):
        end = Trig().grid(torch.ones(1, dtype=dtype))
        assert float(Trig().alpha(end)) == 0.0
        assert float(Trig().sigma(end)) == 1.0
        assert float(Flow().alpha(torch.ones(1, dtype=dtype))) == 0.0
    for p in (Flow(), Trig(), DiscreteVP(), VP()):
        assert float(p.sigma(col(0.0))) == 0.0
        assert float(p.alpha(col(0.0))) == 1.0


def test_vp_is_the_integral_of_its_rate() -> None:
    for t in (0.01, 0.37, 1.0):
        b = quad(lambda u: 0.1 + 19.9 * u, 0, t)[0]
        assert float(VP().alpha(col(t))) == pytest.approx(math.exp(-b / 2), rel=1e-12)
        assert float(VP().sigma(col(t))) == pytest.approx(math.sqrt(1 - math.exp(-b)), rel=1e-12)


def test_cosine_log_snr_is_the_published_line() -> None:
    # logSNR = -2 log tan(a u + b), b = atan(e^-10), a = atan(e^10) - b (algorithms 1.1).
    p, u = Cosine(), np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    t = torch.from_numpy(u)
    got = 2 * torch.log(p.alpha(t) / p.sigma(t))
    assert np.allclose(got.numpy(), -2 * np.log(np.tan(a * u + b)), rtol=1e-10, atol=1e-10)
    assert float(got[0]) == pytest.approx(20, rel=1e-9)
    assert float(got[-1]) == pytest.approx(-20, rel=1e-9)


@pytest.mark.parametrize(
    ("start", "end", "schedule", "steps"),
    [(1e-4, 0.02, "linear", 1000), (0.00085, 0.012, "scaled_linear", 1000), (0.001, 0.2, "linear", 50)],
)
def test_table_equals_the_diffusers_scheduler(start: float, end: float, schedule: str, steps: int) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(
        num_train_timesteps=steps, beta_start=start, beta_end=end, beta_schedule=schedule
    ).alphas_cumprod
    p = DiscreteVP(schedule=schedule, beta_start=start, beta_end=end, steps=steps)  # type: ignore[arg-type]
    ours = p.alpha(torch.arange(1, steps + 1, dtype=F64)) ** 2
    # Theirs is a float32 product of `steps` factors.
    assert torch.allclose(ours, theirs.double(), rtol=4e-6 * steps / 50, atol=0)
    if schedule == "linear":
        exact = np.cumprod(1 - np.linspace(start, end, steps))
        assert np.allclose(ours.numpy(), exact, rtol=1e-11, atol=0)


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule"):
        DiscreteVP(schedule="sigmoid")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PROCESSES)
def test_transitions_compose(name: str) -> None:
    p = PROCESSES[name]
    s, m, t = (p.grid(col(u, u + 0.01)) for u in (0.2, 0.5, 0.9))
    a1, n1 = transition(p, s, m)
    a2, n2 = transition(p, m, t)
    a, n = transition(p, s, t)
    assert torch.allclose(a1 * a2, a, rtol=1e-12)
    assert torch.allclose(a2**2 * n1**2 + n2**2, n**2, rtol=1e-11)
    a0, n0 = transition(p, None, t)
    assert torch.equal(a0, p.alpha(t))
    assert torch.equal(n0, p.sigma(t))
    same_a, same_n = transition(p, t, t)
    assert torch.equal(same_a, torch.ones_like(t))
    assert torch.allclose(same_n, torch.zeros_like(t), atol=1e-7 * float(p.sigma(t).max()))


def test_transition_refuses_what_has_no_kernel() -> None:
    with pytest.raises(ValueError, match="s <= t"):
        transition(Flow(), col(0.1, 0.9), col(0.5, 0.5))
    with pytest.raises(ValueError, match=r"alpha\(s\) > 0"):
        transition(Flow(), col(1.0), col(1.0))


def test_add_noise_from_clean_is_the_definition() -> None:
    p, (b, c, h, w) = Flow(), (2, 3, 4, 5)
    g = torch.Generator().manual_seed(1)
    x, eps = (torch.randn(b, c, h, w, generator=g, dtype=F64) for _ in range(2))
    t = col(0.25, 1.0)
    x_t, target = add_noise(p, x, eps, t)
    assert torch.equal(target, x)
    assert torch.equal(x_t[1], eps[1])
    assert torch.allclose(x_t[0], 0.75 * x[0] + 0.25 * eps[0], rtol=0, atol=1e-15)


def test_per_chunk_times_lead_the_axes() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=F64)
    t = torch.rand(2, 3, dtype=F64)
    assert torch.equal(bc(t, x), t[:, :, None, None])
    with pytest.raises(ValueError, match="do not lead"):
        bc(torch.rand(4, dtype=F64), x)
    assert bc(t, x.bfloat16()).dtype is torch.float32


@pytest.mark.parametrize("name", ["flow", "edm", "vp", "trig", "ddpm"])
@pytest.mark.parametrize("levels", [(0.3, 0.5), (0.4, 0.9), (0.55, 0.6)])
def test_sub_interval_target_is_unbiased_and_the_naive_one_is_not(name: str, levels: tuple[float, float]) -> None:
    # E[target | x_t] by quadrature over x_s of the posterior p(x_s | x_t), against the exact denoiser.
    p = PROCESSES[name]
    s, t = p.grid(col(levels[0])), p.grid(col(levels[1]))
    net = Mixture(p, *MIX)
    alpha_ts, sigma_ts = (float(v) for v in transition(p, s, t))
    spread = float(torch.hypot(p.alpha(t), p.sigma(t)))
    error = naive = 0.0
    for z in (-1.3, -0.2, 0.6, 1.9):
        x_t = z * spread
        # The posterior of x_s lies within the kernel's reach and within the marginal of x_s.
        reach = 12 * float(torch.hypot(2 * p.alpha(s), p.sigma(s)))
        low = max(-reach, (x_t - 12 * sigma_ts) / alpha_ts)
        high = min(reach, (x_t + 12 * sigma_ts) / alpha_ts)
        # The integrand vanishes at both ends, where the trapezoidal rule converges beyond any power.
        x_s = torch.linspace(low, high, 6001, dtype=F64)[:, None]
        eps = (x_t - alpha_ts * x_s) / sigma_ts
        log = net.log_prob(x_s, s.expand(len(x_s))) - 0.5 * eps[:, 0] ** 2
        mass = torch.exp(log - log.max())
        mass = (mass / mass.sum())[:, None]
        again, target = add_noise(p, x_s, eps, t.expand(len(x_s)), s.expand(len(x_s)))
        assert torch.allclose(again, torch.full_like(again, x_t), rtol=0, atol=1e-10 * spread)
        exact = float(net(torch.tensor([[x_t]], dtype=F64), t).x0)
        error = max(error, abs(float((mass * target).sum()) - exact))
        naive = max(naive, abs(float((mass * x_s).sum()) - exact))
    assert error < 1e-9
    assert naive > 0.02


def test_sub_interval_target_is_finite_at_pure_noise() -> None:
    # (x_t - sigma_t^2 / sigma_ts eps) / alpha_t is 0/0 there; the form in x_s is not.
    x, eps = torch.full((1, 1), 0.3, dtype=F64), torch.full((1, 1), -0.8, dtype=F64)
    x_t, target = add_noise(Flow(), x, eps, col(1.0), col(0.5))
    assert float(x_t) == pytest.approx(-0.8)
    assert float(target) == pytest.approx(0.6, abs=1e-15)


def test_prior_has_the_scale_of_its_time() -> None:
    noise = torch.randn(2, 3, 4, 5, dtype=F64)
    t = col(80.0, 2.0)
    assert torch.equal(EDM().prior(noise, t), t[:, None, None, None] * noise)
    for name in ("flow", "trig", "cosine", "vp", "ddpm"):
        assert torch.equal(PROCESSES[name].prior(noise, t), noise)


def test_a_shift_of_three_puts_the_middle_level_at_three_quarters() -> None:
    process = ShiftedFlow(shift=3.0)
    assert process.grid(col(0.25, 0.5, 1.0)).tolist() == pytest.approx([0.5, 0.75, 1.0])
    assert process.level(col(0.5, 0.75, 1.0)).tolist() == pytest.approx([0.25, 0.5, 1.0])
