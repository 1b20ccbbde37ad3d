"""Losses: values and gradients in closed form, optima pointwise."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_core import F64, PROCESSES, Recorder, col, inner_times, kinds
from torch import nn

from fewstep import objectives as obj
from fewstep.algebra.prediction import from_x0
from fewstep.algebra.process import EDM, Flow, Trig
from fewstep.networks.denoiser import Denoiser
from fewstep.objectives.divergence import Expanded, expanded_divergence
from fewstep.objectives.legs import Scales
from fewstep.objectives.regression import x0_weight

SHAPE = (3, 2, 4, 5)


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_surrogate_value_and_gradient() -> None:
    x, g = rand(1).requires_grad_(True), rand(2)
    loss = obj.surrogate_loss(x, g)
    assert float(loss) == pytest.approx(float(0.5 * (g**2).mean()), rel=1e-12)
    (got,) = torch.autograd.grad(loss, x)
    assert torch.allclose(got, g / g.numel(), rtol=1e-12, atol=1e-16)


def test_surrogate_keeps_non_finite_entries_for_the_trainer_to_refuse() -> None:
    x, g = rand(1).requires_grad_(True), rand(2)
    bad = g.clone()
    bad[0, 0, 0, 0], bad[1, 1, 2, 3] = math.nan, math.inf
    (got,) = torch.autograd.grad(obj.surrogate_loss(x, bad), x)
    finite = torch.isfinite(bad)
    assert not torch.isfinite(got[~finite]).any()
    assert torch.allclose(got[finite], (g / g.numel())[finite], rtol=1e-12, atol=1e-16)


def test_surrogate_gradient_does_not_reach_the_score_networks() -> None:
    w = torch.tensor(2.0, dtype=F64, requires_grad=True)
    x = rand(1).requires_grad_(True)
    obj.surrogate_loss(x, w * rand(2)).backward()
    assert w.grad is None


def test_dmd_gradient_is_free_of_scale_and_normalised_by_sample() -> None:
    x, real, fake = rand(1), rand(2), rand(3)
    t = col(0.3, 0.5, 0.9)

    def g(x: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        p, q = (from_x0(Flow(), x, t[: len(x)], y) for y in (fake, real))
        return obj.score_difference(p, q) * obj.dmd_normalizer(x, real)

    base = g(x, real, fake)
    for factor in (2.0, 0.5, 64.0):
        assert torch.equal(g(factor * x, factor * real, factor * fake), base)
    want = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(base, want, rtol=1e-12)
    # One bad sample leaves the others alone.
    big = x.clone()
    big[0] *= 1e6
    assert torch.equal(g(big, real, fake)[1:], base[1:])
    assert torch.isfinite(g(real, real, fake)).all()


def test_mse_is_a_mean_of_per_sample_means() -> None:
    a, b, w = rand(1), rand(2), col(1.0, 2.0, 5.0)
    want = sum(w[i] * ((a[i] - b[i]) ** 2).sum() / 40 for i in range(3)) / 3
    assert float(obj.mse(a, b, w)) == pytest.approx(float(want), rel=1e-12)
    assert float(obj.mse(a, b)) == pytest.approx(float(((a - b) ** 2).mean()), rel=1e-12)


def test_the_two_pseudo_huber_losses_are_different_functions() -> None:
    a, b, c = rand(1), rand(2), 0.3
    d = a - b
    assert float(obj.pseudo_huber_element(a, b, c)) == pytest.approx(
        float((torch.sqrt(d**2 + c * c) - c).sum() / d.numel()), rel=1e-12
    )
    norms = torch.stack([d[i].norm() for i in range(3)])
    assert float(obj.pseudo_huber_sample(a, b, c)) == pytest.approx(
        float((torch.sqrt(norms**2 + c * c) - c).mean()), rel=1e-12
    )
    # c -> 0 is the plain norm.
    assert float(obj.pseudo_huber_sample(a, b, 1e-9)) == pytest.approx(float(norms.mean()), rel=1e-7)


@pytest.mark.parametrize("name", PROCESSES)
def test_x0_weights_turn_an_x0_error_into_the_error_of_the_named_form(name: str) -> None:
    p = PROCESSES[name]
    t = inner_times(p, 3, 0.2, 0.9)
    x, d1, d2 = rand(1), rand(2), rand(3)
    one, two = from_x0(p, x, t, d1), from_x0(p, x, t, d2)

    def loss(kind: str) -> float:
        return float(obj.mse(one.raw(kind), two.raw(kind)))

    def weighted(kind: str) -> float:
        return float(obj.mse(d1, d2, x0_weight(kind, p, t)))  # type: ignore[arg-type]

    assert weighted("x0") == pytest.approx(loss("x0"), rel=1e-12)
    assert weighted("eps") == pytest.approx(loss("eps"), rel=1e-9)
    assert weighted("velocity") == pytest.approx(loss("velocity"), rel=1e-9)
    if name in ("trig", "cosine", "vp", "ddpm", "sd"):
        assert weighted("v") == pytest.approx(loss("v"), rel=1e-9)
    if isinstance(p, EDM):
        assert weighted("edm") == pytest.approx(loss("edm"), rel=1e-9)
    snr = (p.alpha(t) / p.sigma(t)) ** 2
    truncated = torch.maximum(((d1 - d2) ** 2).mean((1, 2, 3)), ((one.eps - two.eps) ** 2).mean((1, 2, 3)))
    assert weighted("snr_truncated") == pytest.approx(float(truncated.mean()), rel=1e-9)
    assert torch.allclose(x0_weight("v", p, t), snr + 1, rtol=1e-12)
    with pytest.raises(ValueError, match="weight"):
        x0_weight("snr", p, t)  # type: ignore[arg-type]


def test_psi_weight_is_that_of_phased_dmd_from_clean_samples() -> None:
    # min(1, 10 t^2) on the velocity error of a flow, whose own weight is 1 / t^2 in x0 (arXiv 2510.27684 at s = 0).
    t = col(0.01, 0.1, 0.3, 0.5, 1.0)
    shares = x0_weight("psi", Flow(), t) / x0_weight("velocity", Flow(), t)
    assert shares.tolist() == pytest.approx([0.001, 0.1, 0.9, 1.0, 1.0], rel=1e-12)
    assert torch.allclose(x0_weight("velocity", Flow(), t), 1 / t**2, rtol=1e-12)
    for p in (Flow(), EDM(), Trig()):
        u = p.grid(col(0.2, 0.6, 0.9))
        alpha, sigma = p.alpha(u), p.sigma(u)
        error = ((alpha + sigma) / sigma) ** 2  # of eps - x0, of an x0 error of 1
        want = error * sigma**2 * torch.minimum(1 / sigma**2, torch.full_like(sigma, 4.0))
        assert torch.allclose(x0_weight("psi", p, u, clamp=4.0), want, rtol=1e-12)


def test_edm_weight_is_its_published_form_and_finite_at_pure_noise() -> None:
    # (sigma^2 + sd^2) / (sigma sd)^2 = 1 / (sigma/alpha)^2 + 1 / sd^2.
    t = col(0.01, 1.5, 80.0)
    assert torch.allclose(x0_weight("edm", EDM(), t), (t**2 + 0.25) / (0.5 * t) ** 2, rtol=1e-12)
    for p in (Flow(), Trig()):
        assert float(x0_weight("edm", p, p.grid(col(1.0)))) == pytest.approx(4.0, rel=1e-12)


@pytest.mark.parametrize("name", ["flow", "edm", "ddpm"])
def test_dsm_is_the_native_loss_of_the_network(name: str) -> None:
    p = PROCESSES[name]
    t = inner_times(p, 3, 0.2, 0.9)
    x, eps = rand(1), rand(2)
    for kind in kinds(p):
        net = Denoiser(Recorder(lambda x, time, c: torch.tanh(x)), p, kind, "t")
        noisy = p.alpha(t)[:, None, None, None] * x + p.sigma(t)[:, None, None, None] * eps
        prediction = net(noisy, t)
        want = ((prediction.x0 - x) ** 2).mean((1, 2, 3))
        for weight in ("x0", "eps", "edm"):
            got = obj.dsm(net, x, t, eps, weight=weight)  # type: ignore[arg-type]
            assert float(got) == pytest.approx(float((want * x0_weight(weight, p, t)).mean()), rel=1e-10)
        if kind == "eps":
            native = ((net.net.answer(noisy, t, None) - eps) ** 2).mean()  # type: ignore[operator,union-attr]
            assert float(obj.dsm(net, x, t, eps, weight="eps")) == pytest.approx(float(native), rel=1e-9)


def _densities() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.linspace(-4, 4, 33, dtype=F64)
    real = torch.distributions.Normal(0.7, 0.6).log_prob(x)
    fake = torch.distributions.Normal(-0.4, 1.1).log_prob(x)
    return x, real, fake


def test_logistic_discriminator_is_stationary_at_the_log_ratio() -> None:
    # Pointwise in x: p_real dL/dl_real + p_fake dL/dl_fake = 0 exactly where l = log p_real / p_fake.
    _, real, fake = _densities()

    def slope(logit: torch.Tensor) -> torch.Tensor:
        a, b = (logit.clone().requires_grad_(True) for _ in range(2))
        da, db = torch.autograd.grad(obj.logistic_discriminator(a, b), (a, b))
        return real.exp() * da + fake.exp() * db

    scale = (real.exp() + fake.exp()) / len(real)
    assert float((slope(real - fake) / scale).abs().max()) < 1e-14
    assert bool((slope(real - fake + 0.1) > 0).all())
    assert bool((slope(real - fake - 0.1) < 0).all())


def test_logistic_values_without_knowledge_and_the_generators_gradient() -> None:
    # min_D L_D = 2 log 2 - 2 JS(p, q): equal laws have logit 0 and 2 log 2.
    zero = torch.zeros(5, 1, dtype=F64)
    assert float(obj.logistic_discriminator(zero, zero)) == pytest.approx(2 * math.log(2), rel=1e-12)
    assert float(obj.logistic_generator(zero)) == pytest.approx(math.log(2), rel=1e-12)
    logit = col(-3.0, 0.5, 40.0).requires_grad_(True)
    (g,) = torch.autograd.grad(obj.logistic_generator(logit), logit)
    assert torch.allclose(g, -torch.sigmoid(-logit) / 3, rtol=1e-12)


def test_hinge_discriminator_prefers_the_sign_of_the_ratio() -> None:
    _, real, fake = _densities()
    logit = torch.linspace(-0.9, 0.9, len(real), dtype=F64)
    a, b = (logit.clone().requires_grad_(True) for _ in range(2))
    da, db = torch.autograd.grad(obj.hinge_discriminator(a, b), (a, b))
    slope = real.exp() * da + fake.exp() * db
    # Inside the margin the slope is (q - p) / 2: the loss falls towards +1 where p > q and towards -1 elsewhere.
    assert torch.allclose(slope, 0.5 * (fake.exp() - real.exp()) / len(real), rtol=1e-12)
    beyond = torch.full((4, 1), 1.5, dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(obj.hinge_discriminator(beyond, -beyond), beyond)
    assert torch.equal(g, torch.zeros_like(g))
    f = col(0.3, -2.0).requires_grad_(True)
    (g,) = torch.autograd.grad(obj.hinge_generator(f), f)
    assert torch.equal(g, col(-0.5, -0.5))


class Quadratic(nn.Module):
    """logit = x' A x / 2 + b' x, gradient A x + b for symmetric A."""

    def __init__(self, d: int) -> None:
        super().__init__()
        a = rand(11, d, d)
        self.a = nn.Parameter(a + a.T)
        self.b = nn.Parameter(rand(12, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        return (0.5 * ((flat @ self.a) * flat).sum(1) + flat @ self.b)[:, None]


def test_exact_r1_has_its_closed_form_and_its_gradient() -> None:
    net, x = Quadratic(12), rand(1, 5, 3, 4)
    value = obj.r1_exact(net, x)
    slope = x.flatten(1) @ net.a + net.b
    assert float(value) == pytest.approx(float((slope**2).sum(1).mean()), rel=1e-12)
    (got,) = torch.autograd.grad(value, net.b)
    assert torch.allclose(got, (2 * slope).mean(0), rtol=1e-11)


def test_finite_difference_r1_tends_to_the_exact_one() -> None:
    # Over the noises sqrt(d) e_i the mean of (n . g)^2 is |g|^2 without sampling error.
    net, x, d = Quadratic(12), rand(1, 1, 3, 4), 12
    noise = math.sqrt(d) * torch.eye(d, dtype=F64).reshape(d, 3, 4)
    exact = float(obj.r1_exact(net, x))
    both = torch.cat((noise, -noise))
    rows = x.expand(2 * d, 3, 4)
    for step, tolerance in ((1e-3, 1e-3), (1e-5, 1e-6)):
        value = float(obj.r1_finite(net, rows, both, step)) / step**2
        assert value == pytest.approx(exact, rel=tolerance)
    assert float(obj.r1_finite(net, rows, 0 * both, 0.1)) == 0.0


@pytest.mark.parametrize("kind", ["rkl", "fkl", "chi2", "js", "jeffreys"])
def test_expanded_divergences_are_those_of_their_generator(kind: Expanded) -> None:
    """alpha = 1 - r F' / (2 F) and weight = F / r for F = r^2 f''(r), derivatives taken of f itself."""
    f = {
        "rkl": lambda r: r * torch.log(r),
        "fkl": lambda r: -torch.log(r),
        "chi2": lambda r: (r - 1) ** 2,
        "js": lambda r: r * torch.log(r) - (r + 1) * torch.log((r + 1) / 2),
        "jeffreys": lambda r: (r - 1) * torch.log(r),
    }[kind]
    r = torch.tensor([0.2, 0.9, 1.0, 3.0], dtype=F64, requires_grad=True)
    (first,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r, create_graph=True)
    whole = r**2 * second
    (slope,) = torch.autograd.grad(whole.sum(), r)
    alpha, weight = expanded_divergence(kind, r)
    torch.testing.assert_close(alpha, 1 - r * slope / (2 * whole))
    torch.testing.assert_close(weight, whole / r)


def test_scales_of_guidance_are_some() -> None:
    assert Scales(of=(1.0, 2.0)).of == (1.0, 2.0)
    with pytest.raises(ValueError, match="of is empty; give at least one scale"):
        Scales(of=())
