"""Conversions between parametrisations, with the points where a formula divides by zero."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_core import F64, PROCESSES, Recorder, col, inner_times, kinds, native

from fewstep.algebra.jump import jump
from fewstep.algebra.prediction import PAIRS, from_raw, from_x0
from fewstep.algebra.process import EDM, DiscreteVP, Flow, Process, Trig
from fewstep.networks.analytic import gaussian
from fewstep.networks.denoiser import Denoiser

SHAPE = (2, 3, 4)


def triple(process: Process, t: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x0, eps, x_t) of shape (len(t), *SHAPE)."""
    g = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(len(t), *SHAPE, generator=g, dtype=F64) for _ in range(2))
    a, s = (f(t).view(-1, 1, 1, 1) for f in (process.alpha, process.sigma))
    return x0, eps, a * x0 + s * eps


CASES = [(name, kind) for name, p in PROCESSES.items() for kind in kinds(p)]


def test_every_parametrisation_is_tested() -> None:
    assert {kind for _, kind in CASES} == set(PAIRS)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_perfect_output_gives_x0_and_eps_and_comes_back(name: str, kind: str) -> None:
    p = PROCESSES[name]
    t = inner_times(p, 7)
    x0, eps, x = triple(p, t)
    a, s, da, ds = (f(t).view(-1, 1, 1, 1) for f in (p.alpha, p.sigma, p.dalpha, p.dsigma))
    raw = native(kind, a, s, da, ds, x0, eps)
    prediction = from_raw(p, kind, x, t, raw)
    # The information about x0 fades as 1/SNR; so does the digit count.
    scale_x0 = (1 + s / a).clamp(max=1e4)
    scale_eps = (1 + a / s).clamp(max=1e4)
    assert float(((prediction.x0 - x0).abs() / scale_x0).max()) < 2e-13
    assert float(((prediction.eps - eps).abs() / scale_eps).max()) < 2e-13
    back = prediction.raw(kind)
    assert torch.allclose(back, raw, rtol=1e-9, atol=1e-9 * float(raw.abs().max()))
    for other in kinds(p):
        again = from_raw(p, other, x, t, prediction.raw(other))
        assert float(((again.x0 - x0).abs() / scale_x0).max()) < 2e-11


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_conversion_has_the_right_tangent(name: str, kind: str) -> None:
    # d/dt of x0(x_t, t) along x_t with a fixed raw output, against a difference quotient.
    p = PROCESSES[name]
    t = inner_times(p, 5, 0.3, 0.7)
    if isinstance(p, DiscreteVP):
        t = t.floor() + 0.5
    _x0, _eps, x = triple(p, t, 3)
    raw = torch.sin(x)
    dx = torch.cos(3 * x)

    def both(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = from_raw(p, kind, x, t, raw)
        return q.x0, q.at(0.5 * t)

    _, tangents = torch.func.jvp(both, (x, t), (dx, torch.ones_like(t)))
    h = 1e-5 * p.t_max / (80 if isinstance(p, EDM) else 1)
    plus, minus = both(x + h * dx, t + h), both(x - h * dx, t - h)
    for tangent, high, low in zip(tangents, plus, minus, strict=True):
        numeric = (high - low) / (2 * h)
        # The table's slope jumps at half of t too, where the jump lands.
        if isinstance(p, DiscreteVP) and tangent is tangents[1]:
            continue
        assert torch.allclose(tangent, numeric, rtol=2e-6, atol=2e-6 * float(numeric.abs().max()))


@pytest.mark.parametrize("name", ["flow", "trig", "ddpm", "vp", "edm"])
def test_clean_end(name: str) -> None:
    # At sigma = 0 every parametrisation but the ill-defined velocity of VP knows x0; score by its own limit.
    p = PROCESSES[name] if name != "edm" else EDM(sigma_min=0.0)
    t = col(0.0, 0.0)
    x0, _, x = triple(p, t)
    assert torch.equal(x, x0)
    g = torch.Generator().manual_seed(5)
    for kind in kinds(p):
        if name == "vp" and kind == "velocity":
            continue
        raw = x0 if kind == "x0" else torch.randn(len(t), *SHAPE, generator=g, dtype=F64)
        q = from_raw(p, kind, x, t, raw)
        assert torch.allclose(q.x0, x0, rtol=0, atol=1e-15), kind
        assert torch.equal(q.at(t), x)
        assert torch.equal(q.at(torch.zeros_like(t)), x)


def test_cm_boundary_is_exact_at_sigma_min() -> None:
    p, t = EDM(), col(0.002, 0.002)
    x = torch.randn(2, *SHAPE, dtype=F64)
    q = from_raw(p, "cm", x, t, torch.full_like(x, 1e6))
    assert torch.equal(q.x0, x)
    assert torch.equal(q.at(t), x)


@pytest.mark.parametrize("name", ["flow", "trig"])
def test_pure_noise_end(name: str) -> None:
    p = PROCESSES[name]
    t = p.grid(col(1.0, 1.0))
    x0, eps, x = triple(p, t)
    assert torch.equal(x, eps)
    one = torch.ones(1, 1, 1, 1, dtype=F64)
    a, s, da, ds = (f(t[:1]) * one for f in (p.alpha, p.sigma, p.dalpha, p.dsigma))
    for kind in kinds(p):
        raw = native(kind, a, s, da, ds, x0, eps)
        if kind in ("eps", "score"):
            with pytest.raises(ValueError, match="no x0 at alpha = 0"):
                from_raw(p, kind, x, t, raw)
            continue
        q = from_raw(p, kind, x, t, raw)
        assert torch.allclose(q.x0, x0, rtol=0, atol=1e-14), kind
        assert torch.allclose(q.eps, eps, rtol=0, atol=1e-14), kind
        assert torch.equal(q.at(torch.zeros_like(t)), q.x0)
        assert torch.equal(q.at(t), x)


def test_one_row_at_an_end_does_not_spoil_the_others() -> None:
    p = Flow()
    t, s = col(0.0, 0.5, 1.0, 0.4), col(0.0, 0.0, 0.3, 0.4)
    x0, eps, x = triple(p, t)
    q = from_raw(p, "velocity", x, t, eps - x0)
    want = (1 - s).view(-1, 1, 1, 1) * x0 + s.view(-1, 1, 1, 1) * eps
    assert torch.allclose(q.at(s), want, rtol=0, atol=1e-14)
    assert torch.equal(q.at(s)[[0, 3]], x[[0, 3]])
    r = from_x0(p, x, t, x0)
    assert torch.isnan(r.eps[0]).all()
    assert torch.isfinite(r.eps[1:]).all()
    assert torch.allclose(r.at(s), want, rtol=0, atol=1e-14)


def test_gradients_at_the_ends_are_finite() -> None:
    p = Flow()
    t, s = col(0.0, 0.5, 1.0), col(0.0, 0.0, 0.0)
    x0, _, x = triple(p, t)
    x0.requires_grad_(True)
    (g,) = torch.autograd.grad(from_x0(p, x, t, x0).at(s).sum(), x0)
    # Row 0 is the identity in x, the others are x0 itself.
    assert torch.equal(g, torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE), torch.ones(SHAPE)]).double())


def test_tangents_at_the_ends_are_finite() -> None:
    p = Trig()
    t = p.grid(col(0.0, 1.0))
    x = torch.randn(2, *SHAPE, dtype=F64)

    def f(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return from_raw(p, "trig", x, t, torch.sin(x)).x0

    _, tangent = torch.func.jvp(f, (x, t), (torch.ones_like(x), torch.ones_like(t)))
    # x0 = cos t x - sin t F.
    c, s = torch.cos(t).view(-1, 1, 1, 1), torch.sin(t).view(-1, 1, 1, 1)
    want = -s * x - c * torch.sin(x) + c - s * torch.cos(x)
    assert torch.allclose(tangent, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", PROCESSES)
def test_jump_of_the_exact_chord_denoiser_composes(name: str) -> None:
    # For a point mass the denoiser is constant, so the DDIM move is the exact flow: it is additive.
    p = PROCESSES[name]
    net = gaussian(p, 0.7, 0.0)
    t, m, s = (p.grid(col(u)) for u in (0.95, 0.6, 0.2))
    x = col(1.3)[:, None]
    direct = jump(net, x, t, s)
    assert torch.allclose(jump(net, jump(net, x, t, m), m, s), direct, rtol=1e-9, atol=1e-12)
    assert torch.equal(jump(net, x, t, t), x)


def test_guidance_mix_is_affine_in_every_parametrisation() -> None:
    for name, p in PROCESSES.items():
        t = inner_times(p, 3)
        x0, _eps, x = triple(p, t)
        g = torch.Generator().manual_seed(9)
        other = from_x0(p, x, t, torch.randn(3, *SHAPE, generator=g, dtype=F64))
        mine = from_x0(p, x, t, x0)
        w = col(0.0, 1.0, 4.5)
        mixed = mine.mix(other, w)
        wide = w.view(-1, 1, 1, 1)
        for kind in kinds(p):
            a, b = mine.raw(kind), other.raw(kind)
            want = b + wide * (a - b)
            assert torch.allclose(mixed.raw(kind), want, rtol=1e-9, atol=1e-9 * float(want.abs().max())), name
        assert torch.equal(mixed.x0[0], other.x0[0])


def test_score_of_the_mixture_is_the_gradient_of_its_log_density() -> None:
    from fewstep.networks.analytic import ring

    for p in (Flow(), EDM(), Trig(), DiscreteVP()):
        net = ring(p, modes=5, radius=1.3, std=0.2)
        t = inner_times(p, 4, 0.2, 0.9)
        x = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(2)) * p.sigma(t)[:, None]
        for cond in (None, torch.tensor([0, 3, 4, 5])):
            leaf = x.clone().requires_grad_(True)
            (g,) = torch.autograd.grad(net.log_prob(leaf, t, cond).sum(), leaf)
            assert torch.allclose(net(x, t, cond).score(), g, rtol=1e-8, atol=1e-10)
        # The class beyond the last one is no class.
        null = torch.full((4,), 5)
        assert torch.allclose(net(x, t, null).x0, net(x, t).x0, rtol=0, atol=1e-14)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction 'epsilon' is not one of"):
        from_raw(Flow(), "epsilon", torch.zeros(1, 1), col(0.5), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="EDM process"):
        from_raw(Flow(), "edm", torch.zeros(1, 1), col(0.5), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="time_input"):
        Denoiser(Recorder(lambda x, t, c: x), Flow(), "x0", "sigma")  # type: ignore[arg-type]


def test_half_precision_output_is_read_in_float32() -> None:
    p = DiscreteVP()
    t = col(1000.0)
    _x0, _eps, x = triple(p, t)
    q = from_raw(p, "v", x.float(), t, torch.zeros(1, *SHAPE, dtype=torch.bfloat16))
    assert q.x0.dtype is torch.float32
    assert torch.allclose(q.x0, p.alpha(t).float() * x.float(), rtol=1e-6)


def test_edm_and_trig_networks_are_one_model() -> None:
    # t = atan(sigma / sd), x_trig = x cos t, F_trig = -F_edm (algorithms 1.2).
    sd = 0.5
    sigma = col(0.01, 0.3, 0.9, 7.0)
    x = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(4)) * sigma[:, None]
    edm = gaussian(EDM(sigma_data=sd), 0.7, 0.4, dim=3)(x, sigma)
    angle = torch.atan(sigma / sd)
    trig = gaussian(Trig(), 0.7 / sd, 0.4 / sd, dim=3)(x * torch.cos(angle)[:, None] / sd, angle)
    assert torch.allclose(trig.raw("trig"), -edm.raw("edm"), rtol=1e-9, atol=1e-12)
    assert torch.allclose(sd * trig.x0, edm.x0, rtol=1e-11, atol=1e-13)


def test_linear_flow_to_trig_formula() -> None:
    # F = [(1 - 2s) x_flow + (1 - 2s + 2s^2) v] / sqrt(s^2 + (1-s)^2), s = sin/(sin + cos) (algorithms 1.2).
    angle = col(0.1, 0.7, 1.2, math.pi / 2 - 1e-3)
    x = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(6))
    s = torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))
    norm = torch.sqrt(s**2 + (1 - s) ** 2)[:, None]
    x_flow = x * norm
    v = gaussian(Flow(), 0.3, 1.1, dim=3)(x_flow, s).raw("velocity")
    s = s[:, None]
    want = ((1 - 2 * s) * x_flow + (1 - 2 * s + 2 * s**2) * v) / norm
    assert torch.allclose(gaussian(Trig(), 0.3, 1.1, dim=3)(x, angle).raw("trig"), want, rtol=1e-10, atol=1e-11)
