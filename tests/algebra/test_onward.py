"""Going on from a sample: closed forms of what is kept of it, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.onward import begun_at, onward
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import Flow
from fewstep.algebra.sampling import Sampler, sample, seeded
from fewstep.networks.analytic import flow_map, ring

M, S = 0.7, 0.4


class FlowMap(nn.Module):
    """The exact probability-flow map to clean of N(M, S^2) as a student."""

    process, takes_s = Flow(), False

    def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Prediction:
        return from_x0(self.process, x, t, flow_map(self.process, M, S, x, t, torch.zeros_like(t)))


@pytest.mark.parametrize(
    ("strength", "kept"),
    [(0.25, 0.7682212796), (0.5, 0.3713906764), (0.65, 0.2105560759), (0.75, 0.1321637201), (0.95, 0.0210479677)],
)
def test_content_that_one_exact_step_keeps(strength: float, kept: float) -> None:
    """x -> m + s/rho (start - alpha m): gain on the source s alpha / rho, on the noise s sigma / rho, deviation s."""
    x = torch.tensor([[M], [M + 1], [M]], dtype=torch.float64)
    noise = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    base, moved, stirred = onward(Sampler(), FlowMap(), x, noise, strength=strength)[:, 0].tolist()
    assert base == pytest.approx(M, abs=1e-12)
    assert moved - base == pytest.approx(kept, abs=5e-11)
    assert math.hypot(S * (moved - base), stirred - base) == pytest.approx(S, abs=1e-9)


def test_what_is_drawn_correlates_as_it_should() -> None:
    n = 20_000
    x = M + S * Draws(fold("onward"), torch.arange(n)).normal(1, dtype=torch.float64)
    noise = Draws(fold("noise"), torch.arange(n)).normal(1, dtype=torch.float64)
    out = onward(Sampler(), FlowMap(), x, noise, strength=0.5)
    got = torch.corrcoef(torch.cat((x, out), 1).T)[0, 1].item()
    assert abs(got - 0.3713906764) < 5 / n**0.5


def test_no_strength_is_the_identity_and_all_of_it_forgets() -> None:
    net, (noise, fresh) = ring(Flow(), modes=3, std=0.3), seeded(1, torch.arange(6), (2,))
    x = torch.randn(6, 2)
    for kind in ("renoise", "map"):
        sampler = Sampler(kind=kind, steps=(1.0, 0.5, 0.25))  # type: ignore[arg-type]
        assert (onward(sampler, net, x, noise, fresh=fresh, strength=1e-4) - x).abs().max() < 2e-3
        whole = onward(sampler, net, x, noise, fresh=fresh, strength=1.0)
        assert torch.equal(whole, onward(sampler, net, x + 5, noise, fresh=fresh, strength=1.0))
        torch.testing.assert_close(whole, sample(sampler, net, noise, fresh=fresh))


def test_levels_are_the_strength_and_what_lies_below_it() -> None:
    sampler = Sampler(steps=(0.78, 0.58, 0.38, 0.18))
    assert begun_at(sampler, 0.78).steps == sampler.steps
    assert begun_at(sampler, 0.5).steps == (0.5, 0.38, 0.18)
    assert begun_at(sampler, 0.1).steps == (0.1,)
    listed = begun_at(Sampler(steps=(1.0, 0.5), lists=((1.0, 0.5), (1.0, 0.7, 0.3))), 0.7)
    assert (listed.steps, listed.counts, listed.lists) == ((0.7, 0.5), None, ())
    for strength in (0.0, -0.5, 1.5):
        with pytest.raises(ValueError, match=r"strength must lie in \(0, 1\]"):
            begun_at(sampler, strength)
    with pytest.raises(ValueError, match=r"strength 0\.9: lies above the first level, 0\.78"):
        begun_at(sampler, 0.9)
    with pytest.raises(ValueError, match="history"):
        begun_at(Sampler(kind="map", steps=(1.0, 0.5), history=(0.0, 0.5)), 0.5)


def test_a_noise_scale_is_of_the_noise_on_the_picture_too() -> None:
    x, noise = torch.full((1, 1), M).double(), torch.ones(1, 1).double()
    one, half = (onward(Sampler(noise_scale=k), FlowMap(), x, noise, strength=0.5).item() - M for k in (1.0, 0.5))
    assert half == pytest.approx(one / 2)
