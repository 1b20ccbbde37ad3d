"""Bridges are ordinary processes in y: coefficients, derivatives, posteriors, and how samplers leave the source."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.algebra.bridge import DDBM, I2SB, Brownian
from fewstep.algebra.noising import angle_of, transition
from fewstep.algebra.prediction import from_x0
from fewstep.algebra.process import DiscreteVP, Flow
from fewstep.algebra.sampling import Sampler, ancestral_step, gamma_step, many_step, sample

F64 = torch.float64
BRIDGES: dict[str, Any] = {"bridge": Brownian(eps=0.5), "i2sb": I2SB(), "ddbm": DDBM()}


def col(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


@pytest.mark.parametrize("name", BRIDGES)
def test_derivatives_and_inverse_agree_with_the_coefficients(name):
    p = BRIDGES[name]
    t = torch.linspace(0.05, 0.95, 9, dtype=F64).requires_grad_()
    for value, slope in ((p.alpha, p.dalpha), (p.sigma, p.dsigma)):
        (found,) = torch.autograd.grad(value(t).sum(), t)
        assert torch.allclose(found, slope(t), rtol=1e-9, atol=1e-9)
    assert torch.allclose(p.t_of_angle(angle_of(p, t.detach())), t.detach(), atol=1e-9)


@pytest.mark.parametrize("name", BRIDGES)
def test_both_ends_are_exact(name):
    p, ends = BRIDGES[name], col(0.0, 1.0)
    assert torch.allclose(p.alpha(ends), col(1.0, 0.0), atol=1e-12)
    assert torch.allclose(p.source(ends), col(0.0, 1.0), atol=1e-12)
    assert torch.allclose(p.sigma(ends), col(0.0, 0.0), atol=1e-7)
    assert angle_of(Brownian(), ends).tolist() == [0.0, pytest.approx(math.pi / 2)]
    assert float(p.t_of_angle(col(math.pi / 2))) == pytest.approx(1.0)


def test_golden_coefficients():
    """controls.md, section 2: DDBM-VP at alpha_t = .9, alpha_T = .5; I2SB with a constant beta is Brownian."""
    ddbm = DDBM(beta_min=0.1, beta_delta=2 * (2 * math.log(2) - 0.1))
    t = ddbm.diffusion.t_of_angle(torch.acos(col(0.9)))
    found = [float(f(t)) for f in (ddbm.source, ddbm.alpha, ddbm.variance)]
    assert found == pytest.approx([0.1407407407, 0.8296296296, 0.1751440329], abs=1e-9)
    flat, brown, t = I2SB(beta_start=0.5, beta_end=0.5), Brownian(eps=0.5), torch.linspace(0.01, 0.99, 7, dtype=F64)
    for name in ("alpha", "source", "variance"):
        assert torch.allclose(getattr(flat, name)(t), getattr(brown, name)(t), atol=1e-12)
    assert torch.allclose(flat.t_of_angle(angle_of(flat, t)), t, atol=1e-9)


@pytest.mark.parametrize("name", BRIDGES)
def test_an_ancestral_step_is_the_posterior_of_the_bridge(name):
    """x_s given x_t, x0 and x_T, by Gaussian conditioning of the bridge's own covariance."""
    p = BRIDGES[name]
    t, s = col(0.8), col(0.3)
    x0, source, x_t, n = col(0.9)[:, None], col(0.1)[:, None], col(0.4)[:, None], col(1.7)[:, None]
    # Of a Markov bridge y is (alpha S) W with W of variance S^2 a Brownian motion in S^2: cov = alpha_s alpha_t S_s^2.
    cov = p.alpha(s) * p.alpha(t) * (p.sigma(s) / p.alpha(s)) ** 2
    gain = cov / p.variance(t)
    mean = p.alpha(s) * x0 + p.source(s) * source + gain * (x_t - p.alpha(t) * x0 - p.source(t) * source)
    deviation = torch.sqrt(p.variance(s) - gain * cov)
    y = x_t - p.source(t) * source
    found = ancestral_step(from_x0(p, y, t, x0), s, n) + p.source(s) * source
    assert torch.allclose(found, mean + deviation * n, atol=1e-12)
    if name == "bridge":
        assert float(mean) == pytest.approx(float(x0 * (1 - 0.3 / 0.8) + x_t * 0.3 / 0.8))
        assert float(deviation) == pytest.approx(math.sqrt(0.5 * 0.3 * 0.5 / 0.8))


def test_ancestral_is_ddim_to_the_way_point_and_noise_from_there():
    p, t, s = DiscreteVP(), col(700.0), col(250.0)
    x, x0, n = col(0.7)[:, None], col(-0.2)[:, None], col(0.4)[:, None]
    ratio = (p.sigma(s) / p.alpha(s)) ** 2 / (p.sigma(t) / p.alpha(t))
    way = p.t_of_angle(torch.atan(ratio))
    alpha, sigma = transition(p, way, s)
    answer = from_x0(p, x, t, x0)
    assert torch.allclose(ancestral_step(answer, s, n), alpha * answer.at(way) + sigma * n, atol=1e-9)
    end = from_x0(Flow(), x, col(1.0), x0)  # from pure noise it re-noises, as eta = 1 does
    assert torch.allclose(ancestral_step(end, col(0.5), n), gamma_step(end, col(0.5), 1.0, n))


class Answer(nn.Module):
    """Knows x0."""

    process = Brownian(eps=0.5)

    def forward(self, x: Any, t: Any, cond: Any = None) -> Any:
        return from_x0(self.process, x, t, torch.full_like(x, 0.3))


def test_samplers_leave_the_source_by_noise():
    noise = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    fresh = lambda i: noise + i  # noqa: E731
    for sampler in (many_step(4), Sampler(kind="ancestral", steps=(1.0, 0.5)), Sampler(steps=(1.0, 0.5))):
        found = sample(sampler, Answer(), noise, None, fresh)
        assert torch.equal(found, torch.full_like(noise, 0.3))
    with pytest.raises(ValueError, match="it needs `fresh` noise"):
        sample(many_step(4), Answer(), noise)
    with pytest.raises(ValueError, match="a bridge is its source at level 1, where nothing says"):
        sample(Sampler(kind="map", steps=(1.0, 0.5)), Answer(), noise, None, fresh)
    below = sample(Sampler(kind="map", steps=(0.9, 0.5)), Answer(), noise, None, fresh)
    assert torch.equal(below, torch.full_like(noise, 0.3))


@pytest.mark.parametrize(("process", "expected"), [(Brownian(), 30), (Flow(), 31)])
def test_calls_are_counted_as_they_are_made(process: Any, expected: int):
    made = 0

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.process = process

        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> Any:
            nonlocal made
            made += 1
            return from_x0(process, x, t, 0.5 * x)

    sampler, noise = many_step(16), torch.ones(2, 1, dtype=F64)
    sample(sampler, Net(), noise, fresh=lambda i: noise)
    assert made == expected
    assert sampler.network_calls(process) == expected
    assert many_step(1).network_calls(process) == 1
    below = Sampler(kind="ode", steps=(0.9, 0.5), solver="heun")
    assert below.network_calls(process) == 3
