"""Solvers, samplers, guidance and student rollouts against closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers_core import F64, PROCESSES, Recorder, col
from torch import nn

from fewstep.algebra.draws import Draws
from fewstep.algebra.guidance import Guided, guided
from fewstep.algebra.jump import calls, solve, solver_step
from fewstep.algebra.noising import transition
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import EDM, DiscreteVP, Flow, Process, Trig
from fewstep.algebra.rollout import renoise, rollout
from fewstep.algebra.sampling import Sampler, gamma_step, many_step, sample, seeded
from fewstep.networks.analytic import flow_map, gaussian, ring
from fewstep.networks.denoiser import Denoiser

M, S = 0.7, 0.4


@pytest.mark.parametrize("name", PROCESSES)
def test_ddim_is_euler_in_sigma_over_alpha(name: str) -> None:
    p = PROCESSES[name]
    net, x = ring(p, modes=3, std=0.3), torch.randn(2, 2, dtype=F64)
    t, s = p.grid(col(0.8, 0.5)), p.grid(col(0.6, 0.1))
    y, level = x / p.alpha(t)[:, None], (p.sigma(t) / p.alpha(t))[:, None]
    to = (p.sigma(s) / p.alpha(s))[:, None]
    slope = (y - net(x, t).x0) / level
    want = p.alpha(s)[:, None] * (y + (to - level) * slope)
    assert torch.allclose(solver_step(net, x, t, s), want, rtol=1e-9, atol=1e-12)


def test_trig_ddim_is_a_rotation() -> None:
    p, t, s = Trig(), col(1.1), col(0.4)
    net, x = gaussian(p, M, S), col(0.3)[:, None]
    q = net(x, t)
    want = torch.cos(t - s) * x - torch.sin(t - s) * q.raw("trig")
    assert torch.allclose(q.at(s), want, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("name", ["flow", "trig", "vp", "edm"])
def test_solver_order(name: str, solver: str, order: int) -> None:
    p = PROCESSES[name]
    net, x = gaussian(p, M, S), col(1.5)[:, None]
    high, low = (0.9, 0.3) if name != "edm" else (0.5, 0.3)
    exact = flow_map(p, M, S, x, p.grid(col(high)), p.grid(col(low)))
    errors = []
    for n in (32, 64):
        times = p.grid(torch.linspace(high, low, n + 1, dtype=F64))
        errors.append(abs(float(solve(net, x, times, solver=solver) - exact)))  # type: ignore[arg-type]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_heun_falls_back_row_by_row_where_sigma_is_zero() -> None:
    p = Flow()
    net, x = gaussian(p, M, S), col(0.5, 0.5)[:, None]
    both = solver_step(net, x, col(0.6, 0.6), col(0.0, 0.2), solver="heun")
    assert torch.equal(both[:1], solver_step(net, x[:1], col(0.6), col(0.0), solver="euler"))
    assert torch.equal(both[1:], solver_step(net, x[1:], col(0.6), col(0.2), solver="heun"))


def test_unknown_solver_is_refused() -> None:
    with pytest.raises(ValueError, match="solver"):
        solver_step(gaussian(Flow(), M, S), col(0.1)[:, None], col(0.6), col(0.2), solver="rk4")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["flow", "trig", "cosine", "vp", "edm"])
def test_many_step_sampler_reaches_the_data(name: str) -> None:
    # The sampler is affine for a Gaussian: two start noises give its mean and spread.
    p = PROCESSES[name]
    sampler = many_step(64)
    noise = torch.tensor([[0.0], [1.0]], dtype=F64)
    out = sample(sampler, gaussian(p, M, S), noise)
    # What the process calls pure noise keeps alpha(t_max) m in its mean.
    start = p.grid(col(1.0))
    rho = torch.hypot(p.alpha(start) * S, p.sigma(start))
    want_spread = float(S * p.sigma(start) / rho)
    want_mean = float(M - S * p.alpha(start) * M / rho)
    assert float(out[1] - out[0]) == pytest.approx(want_spread, abs=6e-3)
    assert float(out[0]) == pytest.approx(want_mean, abs=6e-3)
    assert sampler.network_calls() == 127


class Counted(nn.Module):
    """Counts calls of an exact Gaussian denoiser and keeps their inputs."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.net, self.process = gaussian(process, M, S, dim=3), process
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond=None, **call) -> Prediction:
        self.seen.append((x, t))
        return self.net(x, t)


@pytest.mark.parametrize(
    "sampler",
    [
        many_step(1),
        many_step(5),
        many_step(5, "ddim"),
        Sampler(kind="renoise", steps=(1.0, 0.6, 0.3)),
        Sampler(kind="gamma", steps=(1.0, 0.5)),
    ],
)
def test_promised_calls_are_the_calls_made(sampler: Sampler) -> None:
    net = Counted(Flow())
    noise, fresh = seeded(1, torch.arange(4), (3,))
    sample(sampler, net, noise, None, fresh)
    assert len(net.seen) == sampler.network_calls()
    assert calls(5, "heun") == 9


@pytest.mark.parametrize("name", ["flow", "edm", "trig", "ddpm"])
def test_levels_reach_the_network_in_full_precision(name: str) -> None:
    # 0.9 and 0.3 are not float32 numbers: a level that went through float32 is off by 1e-8.
    p = PROCESSES[name]
    steps = (1.0, 0.9, 0.7, 0.3)
    want = [float(p.grid(col(u))) for u in steps]
    net = Counted(p)
    noise, fresh = seeded(1, torch.arange(2), (3,))
    sample(Sampler(steps=steps), net, noise, None, fresh)
    assert [float(t[0]) for _, t in net.seen] == want
    net = Counted(p)
    rollout(net, Draws(1, torch.arange(2)), (3,), steps, exit=3)
    assert [float(t[0]) for _, t in net.seen] == want


def test_renoise_sampler_by_hand() -> None:
    p, net = Flow(), Counted(Flow())
    noise, fresh = seeded(3, torch.arange(4), (3,))
    got = sample(Sampler(steps=(1.0, 0.5)), net, noise, None, fresh)
    first = net.net(noise, torch.ones(4, dtype=F64)).x0
    x = 0.5 * first + 0.5 * fresh(0)
    assert torch.equal(net.seen[0][0], noise)
    assert torch.allclose(net.seen[1][0], x)
    assert torch.allclose(got, net.net(x, torch.full((4,), 0.5, dtype=F64)).x0)
    with pytest.raises(ValueError, match="fresh"):
        sample(Sampler(steps=(1.0, 0.5)), net, noise)
    assert p.t_max == 1.0


def test_edm_renoise_leaves_the_answer_at_sigma_min() -> None:
    p = EDM()
    x0, eps = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    s = col(0.9, 0.002)
    want = x0 + torch.sqrt(s**2 - 0.002**2)[:, None] * eps
    assert torch.allclose(renoise(p, x0, eps, s), want, rtol=0, atol=1e-15)
    assert torch.equal(renoise(p, x0, eps, s)[1], x0[1])


def test_gamma_step_ends() -> None:
    # eta = 0 is DDIM; eta = 1 re-noises x0; the spread in between is sigma_s^2 in all.
    p, t, s = Flow(), col(0.8), col(0.4)
    q = gaussian(p, M, S)(col(1.2)[:, None], t)
    noise = col(0.37)[:, None]
    assert torch.allclose(gamma_step(q, s, 0.0, noise), q.at(s), rtol=0, atol=1e-15)
    assert torch.allclose(gamma_step(q, s, 1.0, noise), renoise(p, q.x0, noise, s), rtol=0, atol=1e-15)
    alpha, sigma = transition(p, 0.7 * s, s)
    want = alpha * q.at(0.7 * s) + sigma * noise
    assert torch.allclose(gamma_step(q, s, 0.3, noise), want, rtol=0, atol=1e-15)


def test_seeded_noise_depends_on_the_global_index_alone() -> None:
    start, fresh = seeded(9, torch.arange(6), (1, 2, 3))
    part, part_fresh = seeded(9, torch.tensor([4, 1]), (1, 2, 3))
    assert torch.equal(part, start[[4, 1]])
    assert torch.equal(part_fresh(2), fresh(2)[[4, 1]])
    assert not torch.equal(fresh(0), fresh(1))
    assert not torch.equal(fresh(0), start)
    other, _ = seeded(10, torch.arange(6), (1, 2, 3))
    assert not torch.equal(other, start)


STEPS = (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize("name", ["flow", "edm", "ddpm"])
def test_backward_simulation_starts_from_pure_noise(name: str) -> None:
    p = PROCESSES[name]
    noise = Draws(5, torch.arange(4)).normal(3)
    for last in range(4):
        net = Counted(p)
        r = rollout(net, Draws(5, torch.arange(4)), (3,), STEPS, exit=last)
        t = p.grid(col(1.0)).expand(4)
        assert torch.equal(net.seen[0][0], p.prior(noise, t))
        assert len(net.seen) == last + 1
        assert torch.equal(r.t, p.grid(col(STEPS[last])).expand(4))
        assert torch.equal(r.x_in, net.seen[-1][0])
        assert torch.equal(r.x, net.net(r.x_in, r.t).x0)
        # Each later input is the re-noised previous answer.
        d = Draws(5, torch.arange(4))
        drawn = [d.normal(3) for _ in STEPS]
        for i in range(1, last + 1):
            x0 = net.net(*net.seen[i - 1]).x0
            assert torch.equal(net.seen[i][0], renoise(p, x0, drawn[i], net.seen[i][1]))


def test_noise_after_a_rollout_does_not_depend_on_its_exit() -> None:
    after = []
    for last in range(4):
        d = Draws(5, torch.arange(4))
        rollout(Counted(Flow()), d, (3,), STEPS, exit=last)
        after.append(d.normal(3))
    assert all(torch.equal(after[0], x) for x in after[1:])


def test_exit_is_shared_and_every_step_is_met() -> None:
    seen = set()
    for key in range(24):
        exits = []
        for index in (torch.arange(0, 3), torch.arange(3, 9)):
            net = Counted(Flow())
            rollout(net, Draws(key, index), (3,), STEPS)
            exits.append(len(net.seen))
        assert exits[0] == exits[1]
        seen.add(exits[0])
    assert seen == {1, 2, 3, 4}


def test_only_the_exit_step_carries_a_gradient() -> None:
    graded: list[bool] = []

    class Student(nn.Module):
        process = Flow()

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: torch.Tensor, t: torch.Tensor, cond=None, **call) -> Prediction:
            graded.append(torch.is_grad_enabled())
            return from_x0(self.process, x, t, self.w * x)

    student = Student()
    r = rollout(student, Draws(1, torch.arange(4)), (3,), STEPS, exit=2)
    assert graded == [False, False, True]
    r.x.sum().backward()
    assert float(student.w.grad) == pytest.approx(float(r.x_in.sum()), rel=1e-6)
    assert not r.x_in.requires_grad
    assert not rollout(student, Draws(1, torch.arange(4)), (3,), STEPS, exit=2, grad=False).x.requires_grad


def two_sided(process: Process) -> Denoiser:
    """An x0 network whose answer is its class number times x."""
    return Denoiser(Recorder(lambda x, t, c: c[:, None].to(x.dtype) * torch.sin(x)), process, "x0", "t")


def test_guidance_identities() -> None:
    net = two_sided(EDM())
    x, t = torch.randn(3, 2, dtype=F64), col(0.5, 3.0, 40.0)
    cond, null = torch.tensor([2, 5, 7]), torch.tensor([1, 1, 1])
    c, u = net(x, t, cond), net(x, t, null)
    for w in (0.0, 1.0, 4.5, -2.0):
        g = guided(net, x, t, cond, null, w)
        assert torch.allclose(g.x0, u.x0 + w * (c.x0 - u.x0), rtol=1e-13)
        for kind in ("eps", "v", "score", "edm"):
            assert torch.allclose(g.raw(kind), u.raw(kind) + w * (c.raw(kind) - u.raw(kind)), rtol=1e-9, atol=1e-12)
    per_row = guided(net, x, t, cond, null, col(1.0, 2.0, 3.0))
    assert torch.allclose(per_row.x0[1], u.x0[1] + 2 * (c.x0[1] - u.x0[1]))
    # (s_u + w (s_c - s_u)) - s_f = (s_c - s_f) + (w - 1)(s_c - s_u)
    fake = torch.randn_like(x)
    whole = guided(net, x, t, cond, null, 8.0).x0 - fake
    assert torch.allclose(whole, (c.x0 - fake) + 7 * (c.x0 - u.x0), rtol=1e-12, atol=1e-12)


def test_guidance_costs_one_call_and_none_extra_at_scale_one() -> None:
    net = two_sided(Flow())
    x, t = torch.randn(3, 2, dtype=F64), col(0.5, 0.3, 1.0)
    cond, null = torch.tensor([2, 5, 7]), torch.tensor([0, 0, 0])
    guided(net, x, t, cond, null, 3.0)
    guided(net, x, t, cond, null, 1.0)
    assert [len(seen[0]) for seen in net.net.seen] == [6, 3]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="needs a condition"):
        guided(net, x, t, None, None, 2.0)
    both = guided(net, x, t, cond, null, 3.0, interval=(0.4, 2.0))
    free = net(x, t, cond)
    # Levels sigma / alpha are 1, 0.43 and infinite.
    assert torch.allclose(both.x0[2], free.x0[2])
    assert torch.allclose(both.x0[:2], 3 * free.x0[:2])


def test_guided_is_a_denoiser() -> None:
    net = two_sided(DiscreteVP())
    wrapped = Guided(net, 2.5, torch.zeros_like)
    x, t, cond = torch.randn(2, 2, dtype=F64), col(100.0, 900.0), torch.tensor([3, 4])
    assert torch.allclose(wrapped(x, t, cond).x0, 2.5 * net(x, t, cond).x0)
    assert wrapped.process is net.process
    leaf = x.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(wrapped(leaf, t, cond).x0.sum(), leaf)
    assert torch.allclose(g, 2.5 * cond[:, None] * torch.cos(x), rtol=1e-12)


class FlowMap(nn.Module):
    """The exact probability-flow map to clean of N(0, .4^2) as a student."""

    process, takes_s = Flow(), False

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: object = None) -> Prediction:
        to = torch.zeros_like(t)
        return from_x0(self.process, x, t, flow_map(self.process, 0.0, S, x, t, to))


@pytest.mark.parametrize(
    ("count", "scale", "std"),
    [(2, 1.0, 0.3946661886), (2, 0.45, 0.1775997849), (8, 1.0, 0.3990617123), (8, 0.45, 0.1795777705)],
)
def test_noise_scale_is_a_temperature(count: int, scale: float, std: float) -> None:
    """Levels of SiD's protein students (arXiv 2510.03095), whose start is t times the noise: sd of what is drawn.

    Row i hears noise i alone, and the sampler is linear, so that variances are sums of squares.
    """
    k = torch.linspace(30, 400, count, dtype=F64).round()
    steps = tuple((10 ** (-2 * k / 400)).tolist())
    each = torch.eye(count, dtype=F64)[..., None]
    sampler = Sampler(kind="renoise", steps=steps, noise_scale=scale)
    drawn = sample(sampler, FlowMap(), each[0], fresh=lambda i: each[i + 1], start=scale * steps[0] * each[0])
    assert drawn.square().sum().sqrt().item() == pytest.approx(std, abs=5e-11)


@pytest.mark.parametrize("kind", ["renoise", "gamma", "map", "ancestral", "ode"])
def test_noise_scale_is_of_all_noise_and_one_is_none(kind: str) -> None:
    net = ring(Flow(), modes=3, std=0.3)
    noise, fresh = seeded(3, torch.arange(6), (2,))
    sampler = Sampler(kind=kind, steps=(0.9, 0.5, 0.2))  # type: ignore[arg-type]
    plain = sample(sampler, net, noise, fresh=fresh)
    assert torch.equal(plain, sample(replace(sampler, noise_scale=1.0), net, noise, fresh=fresh))
    cold = sample(replace(sampler, noise_scale=0.6), net, noise, fresh=fresh)
    assert torch.equal(cold, sample(sampler, net, 0.6 * noise, fresh=lambda i: 0.6 * fresh(i)))
    assert not torch.equal(cold, plain)
    start = torch.randn(6, 2)
    kept = sample(replace(sampler, steps=(0.9,), noise_scale=0.6), net, noise, fresh=fresh, start=start)
    assert torch.equal(kept, sample(replace(sampler, steps=(0.9,)), net, noise, fresh=fresh, start=start))


def test_a_noise_scale_is_positive() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        Sampler(noise_scale=0.0)
