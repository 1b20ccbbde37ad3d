"""Conventions that two places must share: table indices, weights, heads, way points, tapped features."""

from __future__ import annotations

import torch

from fewstep import objectives as obj
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.guidance import Guided
from fewstep.algebra.prediction import PAIRS, Prediction
from fewstep.algebra.process import EDM, VP, DiscreteVP, Flow, Process
from fewstep.algebra.rollout import renoise
from fewstep.algebra.sampling import gamma_step, way_point
from fewstep.algebra.times import Index
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.objectives.regression import x0_weight

F64 = torch.float64


def draws(count: int) -> Draws:
    return Draws(fold("conventions"), torch.arange(count))


def test_an_index_on_a_ddpm_table_is_the_tables_own() -> None:
    """Index k of DDPM has alpha_bar_k, so index 0 is noisy: sigma^2 = beta_0."""
    process = DiscreteVP()
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    for k in (0, 20, 979, 999):
        t = Index(low=k, high=k).sample(draws(3), process)
        torch.testing.assert_close(process.alpha(t) ** 2, alpha_bar[k].expand(3), rtol=1e-9, atol=0)
    t = Index(low=0, high=3).sample(draws(400), process)
    assert sorted(set(t.tolist())) == [1.0, 2.0, 3.0, 4.0]
    ends = [Index(low=k, high=k).sample(draws(1), EDM()).item() for k in (0, 999)]
    assert ends == [0.002, 80.0]


def test_the_v_weight_is_the_v_loss_where_variance_is_preserved() -> None:
    t = torch.linspace(0.1, 0.9, 7, dtype=F64)
    error = torch.randn(7, 5, dtype=F64, generator=torch.Generator().manual_seed(1))
    processes: tuple[Process, ...] = (VP(), Flow())
    for process in processes:
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        # Two answers at one x_t whose x0 differ by `error`: eps differs by -alpha / sigma times that.
        a, b = PAIRS["v"](process, t)
        v_error = a[:, None] * error - b[:, None] * alpha / sigma * error
        got = x0_weight("v", process, t)[:, None] * error**2
        torch.testing.assert_close(v_error**2, got * (alpha**2 + sigma**2), rtol=1e-12, atol=0)
        torch.testing.assert_close(got, (1 + (alpha / sigma) ** 2) * error**2, rtol=1e-12, atol=0)


def test_both_forms_of_r1_sum_over_heads_alike() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 3, dtype=F64, generator=generator)
    x = torch.randn(4, 6, dtype=F64, generator=generator)

    def logits(z: torch.Tensor) -> torch.Tensor:
        return torch.sin(z) @ weight

    exact = obj.r1_exact(logits, x)
    # Along the axes e_i the finite form gives the squared partial derivatives of the summed logit.
    step, total = 1e-5, torch.zeros((), dtype=F64)
    for i in range(6):
        axis = torch.zeros_like(x)
        axis[:, i] = 1
        total = total + obj.r1_finite(logits, x, axis, step) / step**2
    torch.testing.assert_close(total, exact, rtol=1e-4, atol=0)
    one = obj.r1_finite(lambda z: logits(z)[:, 0], x, torch.ones_like(x), step)
    assert one.ndim == 0
    assert float(one) > 0


def test_a_gamma_step_with_eta_one_is_re_noising_in_every_process() -> None:
    generator = torch.Generator().manual_seed(3)
    x, x0, eps, noise = (torch.randn(2, 3, 4, dtype=F64, generator=generator) for _ in range(4))
    for process in (EDM(), Flow(), VP(), DiscreteVP()):
        t, s = (process.grid(torch.full((2,), u, dtype=F64)) for u in (0.8, 0.3))
        prediction = Prediction(x0, eps, x, t, process)
        torch.testing.assert_close(
            gamma_step(prediction, s, 1.0, noise), renoise(process, x0, noise, s), rtol=1e-12, atol=1e-14
        )
        # eta = 0 is the deterministic step.
        torch.testing.assert_close(gamma_step(prediction, s, 0.0, noise), prediction.at(s), rtol=1e-12, atol=1e-12)


def test_a_way_point_on_a_table_is_rounded_down_to_an_index() -> None:
    """floor((1 - eta) index), where index 0 is clean; t = index + 1."""
    process = DiscreteVP()
    index = torch.tensor([749.0, 499.0, 249.0, 2.0, 1.0, 0.0], dtype=F64)
    way = way_point(process, index + 1, 0.3)
    assert way.tolist() == [525.0, 350.0, 175.0, 2.0, 0.0, 0.0]
    assert way_point(process, process.grid(torch.tensor([0.75], dtype=F64)), 0.0).item() == 750.0
    # Counted from sigma_min = .002, the clean end of this process.
    assert abs(way_point(EDM(), torch.tensor([0.0021], dtype=F64), 0.3).item() - 0.00207) < 1e-15


def test_a_guided_denoiser_gives_the_features_of_its_conditional_half() -> None:
    torch.manual_seed(4)
    net = Denoiser(MLP(3, 16, 4, classes=5), Flow(), "velocity", "angle").eval()
    guided = Guided(net, 2.5, lambda c: torch.full_like(c, 5))
    x, t, cond = torch.randn(7, 3), torch.linspace(0.2, 0.9, 7, dtype=F64), torch.arange(7) % 5
    with torch.no_grad():
        alone = guided.features(x, t, cond, ("mid",))["mid"]
        whole = guided(x, t, cond, taps=("mid",)).features["mid"]
        other = net.features(x, t, torch.full_like(cond, 5), ("mid",))["mid"]
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-6)
    assert float((alone - other).abs().max()) > 1e-3
