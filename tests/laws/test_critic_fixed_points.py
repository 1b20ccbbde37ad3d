"""A critic's loss is least at the exact denoiser of what it is trained on."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_core import F64, PROCESSES, Recorder, col, kinds
from torch import nn

from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import DiscreteVP, Flow, Process
from fewstep.networks.analytic import gaussian
from fewstep.networks.denoiser import Denoiser
from fewstep.objectives import dsm, mse

M, S = -0.6, 1.3

# Gauss and Hermite's three nodes with weights 1/6, 2/3, 1/6 as a multiset: a plain batch mean over it is exact
# for polynomials up to degree five, and the losses here are of degree two.
NODES = math.sqrt(3) * col(-1, 0, 0, 0, 0, 1)


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    z, e = torch.meshgrid(NODES, NODES, indexing="ij")
    return z.reshape(-1, 1), e.reshape(-1, 1)


def best_affine(process: Process, kind: str, loss) -> torch.Tensor:
    """The minimiser (w0, w1) of a quadratic loss of the network raw = w0 + w1 x, by one Newton step."""

    def of(w: torch.Tensor) -> torch.Tensor:
        return loss(Denoiser(Recorder(lambda x, t, c: w[0] + w[1] * x / 10), process, kind, "t"))

    zero = torch.zeros(2, dtype=F64)
    g = torch.autograd.functional.jacobian(of, zero)
    h = torch.autograd.functional.hessian(of, zero)
    return -torch.linalg.solve(h, g) / torch.tensor([1.0, 10.0], dtype=F64)


def check(process: Process, kind: str, t: torch.Tensor, w: torch.Tensor) -> None:
    x = torch.tensor([[-2.0], [0.3], [1.7]], dtype=F64) * float(process.sigma(t[:1]))
    rows = t[:1].expand(3)
    net = Denoiser(Recorder(lambda y, time, c: w[0] + w[1] * y), process, kind, "t")
    if kind in ("edm", "cm"):
        # These see c_in x; the fitted slope already is in those units.
        assert net._inputs(x, rows)[0].shape == x.shape
    want = gaussian(process, M, S)(x, rows).x0
    assert torch.allclose(net(x, rows).x0, want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["flow", "edm", "trig", "vp", "ddpm"])
@pytest.mark.parametrize("weight", ["x0", "edm"])
def test_regression_optimum_is_the_analytic_denoiser(name: str, weight: str) -> None:
    p = PROCESSES[name]
    z, e = pairs()
    for u in (0.35, 0.8):
        t = p.grid(col(u)).expand(len(z))
        for kind in kinds(p):
            w = best_affine(p, kind, lambda net, t=t: dsm(net, M + S * z, t, e, weight=weight))  # type: ignore[arg-type]
            check(p, kind, t, w)


@pytest.mark.parametrize("name", ["flow", "edm", "vp"])
@pytest.mark.parametrize("levels", [(0.3, 0.7), (0.5, 0.55)])
def test_sub_interval_critic_has_the_same_optimum_and_the_naive_one_has_not(
    name: str, levels: tuple[float, float]
) -> None:
    p = PROCESSES[name]
    z, e = pairs()
    s, t = (p.grid(col(u)).expand(len(z)) for u in levels)
    rho = torch.hypot(p.alpha(s) * S, p.sigma(s))[:, None]
    x_s = p.alpha(s)[:, None] * M + rho * z
    for kind in kinds(p):
        check(p, kind, t, best_affine(p, kind, lambda net: dsm(net, x_s, t, e, s=s)))

    def naive(net: nn.Module) -> torch.Tensor:
        return mse(net(add_noise(p, x_s, e, t, s)[0], t).x0, x_s)

    w = best_affine(p, "x0", naive)
    x = torch.tensor([[1.7]], dtype=F64) * float(p.sigma(t[:1]))
    assert abs(float(w[0] + w[1] * x) - float(gaussian(p, M, S)(x, t[:1]).x0)) > 5e-3


def test_trained_network_finds_the_score_of_its_samples() -> None:
    # A mixture needs a curve: least squares on many bumps against the exact denoiser at one level.
    from fewstep.algebra.draws import Draws
    from fewstep.networks.analytic import Mixture

    p = Flow()
    net = Mixture(p, [0.3, 0.7], [[-1.2], [0.8]], [0.25, 0.35])
    draws = Draws(2, torch.arange(60_000))
    x0, _ = net.draw(draws)
    t = torch.full((60_000,), 0.5, dtype=F64)
    x_t, target = add_noise(p, x0.double(), draws.normal(1, dtype=F64), t)
    centres = torch.linspace(-2, 2, 13, dtype=F64)

    def bumps(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(-0.5 * ((x - centres) / 0.45) ** 2)

    phi = bumps(x_t)
    w = torch.linalg.lstsq(phi, target).solution
    x = torch.linspace(-1.2, 1.2, 25, dtype=F64)[:, None]
    fit = bumps(x) @ w
    exact = net(x, t[:25]).x0
    # 60,000 samples leave a standard error of about 0.01 in the bulk.
    assert float((fit - exact).abs().max()) < 0.06
    assert float((fit - exact).pow(2).mean().sqrt()) < 0.02


def test_the_ddpm_table_and_time_input_agree_in_training() -> None:
    # A network told the table index must be told the index of the level it sees.
    p = DiscreteVP()
    seen = Recorder(lambda x, t, c: torch.zeros_like(x))
    dsm(
        Denoiser(seen, p, "eps", "index"),
        torch.zeros(2, 1, dtype=F64),
        col(1.0, 1000.0),
        torch.ones(2, 1, dtype=F64),
    )
    x, index, _ = seen.seen[0]
    assert index.tolist() == [0.0, 999.0]
    assert float(x[0]) == pytest.approx(math.sqrt(1e-4), rel=1e-9)
    assert float(x[1]) == pytest.approx(math.sqrt(1 - 4.0358e-5), rel=1e-8)
