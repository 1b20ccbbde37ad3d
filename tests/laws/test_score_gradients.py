"""Gradients away from the optimum against closed forms and quadrature in float64."""

from __future__ import annotations

import math

import pytest
import torch
from distribution_cases import F64, MEAN, STD, VE, Affine, Follow, LogRatio, Scripted, batch64, players
from helpers_core import normal_nodes
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import Flow
from fewstep.algebra.times import Levels, Uniform
from fewstep.methods.decoupled_dmd import DecoupledDMD
from fewstep.methods.emd import EMD
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.methods.vsd import VSD
from fewstep.networks.analytic import gaussian
from fewstep.objectives import divergence_weight, expanded_divergence, inverse_matching


def grid(count: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Two standard normal columns (n, 1) and their joint weights (n,)."""
    x, w = normal_nodes(count)
    a, b = torch.meshgrid(x, x, indexing="ij")
    return a.reshape(-1, 1), b.reshape(-1, 1), (w[:, None] * w[None]).reshape(-1)


def level_of(sigma: float) -> Levels:
    """The Karras level u of a sigma of the process VE."""
    low, high = VE.sigma_min ** (1 / 7), VE.sigma_max ** (1 / 7)
    return Levels(at=((sigma ** (1 / 7) - low) / (high - low),))


@pytest.mark.parametrize(
    ("sigma", "d_mean", "d_std"),
    [(0.5, -4.1463414634, 3.0585365854), (2.0, -0.4086538462, 0.1205769231)],
)
def test_score_difference_is_the_gradient_of_kl(sigma: float, d_mean: float, d_std: float):
    roles = players(VE, -1.0, 1.5)
    z, eps, w = grid()
    x = -1.0 + 1.5 * z
    batch = Batch(Scripted([eps]), (1,))
    g, _ = VSD(weight="kl", times=level_of(sigma)).gradient(roles, batch, x)
    assert math.isclose(float((w * g[:, 0]).sum()), d_mean, rel_tol=1e-8)
    assert math.isclose(float((w * g[:, 0] * z[:, 0]).sum()), d_std, rel_tol=1e-8)


def test_swiftbrush_weight_is_the_eps_difference_times_sigma_squared():
    roles = players(Flow(), -1.0, 1.5)
    z, eps, _ = grid(9)
    x = -1.0 + 1.5 * z
    g, _ = VSD(times=Levels(at=(0.3,))).gradient(roles, Batch(Scripted([eps]), (1,)), x)
    t = torch.full((len(x),), 0.3, dtype=F64)
    x_t, _ = add_noise(Flow(), x, eps, t)
    expected = 0.3**2 * (roles.teacher(x_t, t).eps - roles.critic(x_t, t).eps)
    assert torch.allclose(g, expected, atol=1e-12)


def expanded(kind: str, mean: Tensor, std: Tensor, sigma: float) -> Tensor:
    """E_p[r^2 f''(r) (s_q - s_p)^2] at one noise level by quadrature under p, r = q / p."""
    n, w = normal_nodes(120)
    vp, vq = STD**2 + sigma**2, std**2 + sigma**2
    x = MEAN + math.sqrt(vp) * n
    log_p = -0.5 * ((x - MEAN) ** 2 / vp + math.log(vp))
    r = torch.exp(-0.5 * ((x - mean) ** 2 / vq + torch.log(vq)) - log_p)
    gap = -(x - mean) / vq + (x - MEAN) / vp
    big_f = {
        "rkl": r,
        "fkl": torch.ones_like(r),
        "chi2": 2 * r**2,
        "js": r / (1 + r),
        "jeffreys": 1 + r,
    }[kind]
    return (w * big_f * gap**2).sum()


def tractable(kind: str, mean: float, std: float, sigma: float, detach: bool = False) -> tuple[Tensor, Tensor]:
    """Gradient of 2 sigma^-4 times inverse matching with the divergence's alpha and weight, by quadrature."""
    student = Affine(VE, mean, std)
    z, eps, w = grid(70)
    x = student.mean + student.std * z
    t = torch.full((len(z),), sigma, dtype=F64)
    x_t, _ = add_noise(VE, x, eps, t)
    ratio = torch.exp(-LogRatio(student)(x_t, t)[:, 0])
    alpha, weight = expanded_divergence(kind, ratio.detach() if detach else ratio)
    real, fake = gaussian(VE, MEAN, STD)(x_t, t), Follow(student)(x_t, t)
    loss = 2 * (w * inverse_matching(real, fake, x, alpha=alpha, ratio=weight)).sum() / sigma**4
    return torch.autograd.grad(loss, (student.mean, student.std))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["rkl", "fkl", "chi2", "js", "jeffreys"])
def test_inverse_matching_has_the_gradient_of_every_expanded_divergence(kind: str):
    mean = torch.tensor(0.4, dtype=F64, requires_grad=True)
    std = torch.tensor(0.55, dtype=F64, requires_grad=True)
    exact = torch.autograd.grad(expanded(kind, mean, std, 0.8), (mean, std))
    found = tractable(kind, 0.4, 0.55, 0.8)
    assert torch.allclose(torch.stack(found), torch.stack(exact), rtol=1e-6)
    if kind != "rkl":
        cut = torch.stack(tractable(kind, 0.4, 0.55, 0.8, detach=True))
        assert (cut - torch.stack(exact)).abs().max() > 0.01


def test_forward_kl_matches_the_printed_numbers():
    found = tractable("fkl", 0.4, 0.55, 0.8)
    assert math.isclose(float(found[0]), -0.675443, abs_tol=1e-6)
    assert math.isclose(float(found[1]), 0.137955, abs_tol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_value_of_sid_at_the_critics_optimum(alpha: float):
    student = Affine(VE, -1.0, 1.5)
    z, eps, w = grid()
    t = torch.full((len(z),), 0.5, dtype=F64)
    x = (-1.0 + 1.5 * z).detach()
    x_t, _ = add_noise(VE, x, eps, t)
    value = inverse_matching(gaussian(VE, MEAN, STD)(x_t, t), Follow(student)(x_t, t), x, alpha=alpha)
    assert math.isclose(float((w * value).sum()), (1 - alpha) * 1.7241374182, rel_tol=1e-8, abs_tol=1e-9)


@pytest.mark.parametrize("kind", ["rkl", "fkl", "js", "softened_rkl", "hellinger", "neyman", "jeffreys"])
def test_f_distill_weight_makes_the_gradient_of_its_divergence(kind: str):
    sigma, mean0, std0 = 0.8, 0.4, 0.55
    f = {
        "rkl": lambda r: -torch.log(r),
        "fkl": lambda r: r * torch.log(r),
        "js": lambda r: r * torch.log(r) - (r + 1) * torch.log((r + 1) / 2),
        "softened_rkl": lambda r: (r + 1) * torch.log((r + 1) / (2 * r)),
        "hellinger": lambda r: 1 - torch.sqrt(r),
        "neyman": lambda r: (1 - r) ** 2 / r,
        "jeffreys": lambda r: (r - 1) * torch.log(r),
    }[kind]
    mean = torch.tensor(mean0, dtype=F64, requires_grad=True)
    std = torch.tensor(std0, dtype=F64, requires_grad=True)
    n, w = normal_nodes(120)
    vp, vq = STD**2 + sigma**2, std**2 + sigma**2
    x = mean + torch.sqrt(vq) * n  # samples of q; the density ratio below depends on the parameters twice
    log_r = -0.5 * ((x - MEAN) ** 2 / vp + math.log(vp)) + 0.5 * ((x - mean) ** 2 / vq + torch.log(vq))
    exact = torch.autograd.grad((w * f(torch.exp(log_r))).sum(), (mean, std))

    z, eps, ww = grid(70)
    student = Affine(VE, mean0, std0)
    roles = players(VE, mean0, std0)
    x0 = (student.mean + student.std * z).detach()
    t = torch.full((len(z),), sigma, dtype=F64)
    x_t, _ = add_noise(VE, x0, eps, t)
    ratio = torch.exp(LogRatio(student)(x_t, t)[:, 0])
    g = divergence_weight(kind, ratio) * (roles.critic(x_t, t).x0 - roles.teacher(x_t, t).x0)[:, 0] / sigma**2
    assert math.isclose(float((ww * g).sum()), float(exact[0]), rel_tol=1e-6)
    assert math.isclose(float((ww * g * z[:, 0]).sum()), float(exact[1]), rel_tol=1e-6)


def test_phased_weight_is_the_gradient_of_kl_at_the_interval_end():
    # x_s = mean + std z at s = 0.5, noised to t = 0.8, against the teacher's marginal at t.
    s, t, mean, std = 0.5, 0.8, 0.1, 0.9
    flow = Flow()
    m = torch.tensor(mean, dtype=F64, requires_grad=True)
    b = torch.tensor(std, dtype=F64, requires_grad=True)
    a_ts, var_ts = 0.4, 0.6
    vq, vp = a_ts**2 * b**2 + var_ts, (0.2 * STD) ** 2 + t**2
    kl = 0.5 * (math.log(vp) - torch.log(vq) + (vq + (a_ts * m - 0.2 * MEAN) ** 2) / vp - 1)
    exact = torch.autograd.grad(kl, (m, b))

    z, eps, w = grid()
    x_s = mean + std * z

    class Critic(torch.nn.Module):
        """What the unbiased target leads to: Tweedie on q_t, D = (x + sigma^2 score) / alpha."""

        process = flow

        def forward(self, x: Tensor, time: Tensor, cond: object = None, **call: object) -> object:
            from fewstep.algebra.prediction import from_x0

            var = a_ts**2 * std**2 + var_ts
            score = -(x - a_ts * mean) / var
            return from_x0(flow, x, time, (x + 0.64 * score) / 0.2)

    roles = players(flow, critic=Critic())
    method = PhasedDMD(weight="kl", times=Levels(at=((t - s) / (1 - s),)))
    g, _ = method.gradient(roles, Batch(Scripted([eps]), (1,)), x_s, x_s)
    assert math.isclose(float((w * g[:, 0]).sum()), float(exact[0]), rel_tol=1e-8)
    assert math.isclose(float((w * g[:, 0] * z[:, 0]).sum()), float(exact[1]), rel_tol=1e-8)


def test_guided_gradient_splits_into_matching_and_augmentation():
    # A conditional teacher: two classes with means 0.7 and -0.5, null class both.
    from fewstep.networks.analytic import Mixture

    flow = Flow()
    teacher = Mixture(flow, [1.0, 1.0], [[0.7], [-0.5]], [0.4, 0.3], [0, 1])
    student = Affine(flow, 0.2, 0.8)
    from fewstep.networks.roles import Roles

    roles = Roles(teacher=teacher, student=student, critic=Follow(student))
    b = 6
    cond = torch.tensor([0, 1, 0, 1, 1, 0])
    x = torch.linspace(-1, 1, b, dtype=F64)[:, None]
    eps = torch.linspace(-1.3, 0.8, b, dtype=F64)[:, None]
    method = DecoupledDMD(guidance=3.0, schedule="coupled", normalizer="shared", times=DecoupledDMD().times)
    batch = Batch(Scripted([eps]), (1,), cond=cond, null_cond=torch.full((b,), 2))
    g, _ = method.gradient(roles, batch, x, 1.0)
    u = 0.02 + 0.96 * Scripted([eps]).uniform()
    x_t, _ = add_noise(flow, x, eps, u)
    c, n = teacher(x_t, u, cond).x0, teacher(x_t, u, torch.full((b,), 2)).x0
    scale = (x - c).abs()
    expected = ((roles.critic(x_t, u).x0 - c) + (1 - 3.0) * (c - n)) / scale
    assert torch.allclose(g, expected, atol=1e-10)


def test_augmentation_levels_stay_below_the_students_level_and_shift_after():
    method = DecoupledDMD(times=Uniform(low=0.0, high=1.0, shift=3.0))
    batch = batch64(4000)
    u = method.below(batch, 0.6)
    unshifted = 0.6 / (3 - 2 * 0.6)
    assert u.max() <= 0.6
    assert u.max() > 0.59
    back = u / (3 - 2 * u)
    # Uniform on the unshifted axis: mean half of its end, to four standard errors.
    assert abs(float(back.mean()) - unshifted / 2) < 4 * unshifted / math.sqrt(12 * 4000)


def test_em_chain_is_stationary_where_scores_agree():
    # delta = 0: one step has variance (1-g)^2 + 2g = 1 + g^2 from a standard normal start.
    roles = players(Flow())
    method = EMD(langevin=1, step_eps=0.16, step_z=0.0)
    batch = batch64(200_000)
    z, tau, eps = batch.noise(), torch.full((200_000,), 0.5, dtype=F64), batch.noise()
    chain = method.chain(roles, batch, z, eps, tau)
    assert abs(float(chain.eps.var()) - 1.0256) < 4 * math.sqrt(2 / 200_000) * 1.0256
    # All of it is injected noise, so the cancelled target is zero.
    assert (chain.eps - chain.noise).abs().max() < 1e-12


def test_em_latent_drift_is_the_gradient_of_the_log_ratio():
    student = Affine(Flow(), 0.3, 0.8)
    from fewstep.networks.roles import Roles

    roles = Roles(teacher=gaussian(Flow(), MEAN, STD), student=student, critic=Follow(student))
    z = torch.tensor([[-0.6], [0.2], [1.1]], dtype=F64, requires_grad=True)
    eps = torch.tensor([[0.4], [-1.0], [0.3]], dtype=F64)
    tau = torch.full((3,), 0.4, dtype=F64)
    x_t = 0.6 * (0.3 + 0.8 * z) + 0.4 * eps
    (expected,) = torch.autograd.grad(LogRatio(student)(x_t, tau).sum(), z)
    silent = torch.zeros_like(eps)
    batch = Batch(Scripted([silent, silent]), (1,))
    moved = EMD(langevin=1, step_z=1e-3).chain(roles, batch, z.detach(), eps, tau)
    assert torch.allclose(moved.z, z + 1e-3 * (expected - z), atol=1e-12)
