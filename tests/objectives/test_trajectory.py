"""Targets of the trajectory family vanish at the exact flow map, and give the golden numbers away from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from trajectory_helpers import F64, FOUR, MEAN, STD, ExactMap, exact_leg, noisy

from fewstep.algebra.draws import Draws
from fewstep.algebra.jump import jump, solver_step
from fewstep.algebra.prediction import from_raw
from fewstep.algebra.process import EDM, Flow, Process, Trig, bc
from fewstep.config import UserError
from fewstep.networks.analytic import Mixture, flow_map, gaussian
from fewstep.networks.denoiser import Denoiser, Rescheduled
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.dit import DiT
from fewstep.networks.mlp import MLP
from fewstep.objectives import trajectory as tr

KINDS = ("velocity", "v", "psi", "trig")


def times(process: Process) -> tuple[Tensor, Tensor, Tensor]:
    """t > u > s inside the process, the last with s at the clean end."""
    level = torch.tensor([[0.95, 0.7, 0.3], [0.6, 0.5, 0.45], [0.8, 0.4, 0.0]], dtype=F64)
    t, u, s = process.grid(level).unbind(1)
    return t, u, s


@pytest.mark.parametrize("name", FOUR)
def test_two_legs_of_the_exact_map_are_its_jump(name: str) -> None:
    process = FOUR[name]
    student, (t, u, s) = ExactMap(process), times(process)
    x = noisy(process, t, name)

    def own(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return jump(student, x, t, s)

    for first, second in ((exact_leg(process), own), (own, exact_leg(process)), (own, own)):
        target = tr.two_leg(first, second, x, t, u, s)
        assert torch.allclose(target, own(x, t, s), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FOUR)
def test_continuous_residuals_vanish_at_the_exact_map(name: str, kind: str) -> None:
    process = FOUR[name]
    student, (t, _, s) = ExactMap(process), times(process)
    x, teacher = noisy(process, t, name), gaussian(process, MEAN, STD)
    raw = tr.raw_of(student, kind)
    value, v = raw(x, t, s), teacher(x, t).velocity()
    one = torch.ones_like(t)
    scale = v.abs() + 1
    moved = tr.tangent(raw, (x, t, s), (v, one, None))
    slope = tr.slopes(process, kind, t, s, "t")
    residual = tr.eulerian(slope, x, v, value, moved)
    assert (residual.abs() / scale).max() < 1e-8
    # A student that is off by a little must not pass: the target sees it.
    wrong = tr.eulerian(slope, x, v, 1.1 * value + 0.1, moved)
    assert (wrong.abs() / scale).max() > 1e-4
    inner = process.grid(torch.tensor([0.3, 0.45, 0.2], dtype=F64))
    slope = tr.slopes(process, kind, t, inner, "s")
    end = flow_map(process, MEAN, STD, x, t, inner)
    draw = tr.tangent(raw, (x, t, inner), (None, None, one))
    value = raw(x, t, inner)
    residual = tr.lagrangian(slope, x, value, draw, teacher(end, inner).velocity())
    assert (residual.abs() / (teacher(end, inner).velocity().abs() + 1)).max() < 1e-8
    a, b = tr.coefficients(process, kind, t, inner)
    assert torch.allclose(bc(a, x) * x + bc(b, x) * value, end, atol=1e-10)


def quantile_map(mixture: Mixture, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The 1-D flow map: same quantile at t and at s, by bisection."""

    def cdf(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = mixture.process.alpha(t)[:, None], mixture.process.sigma(t)[:, None]
        spread = torch.sqrt((alpha * mixture.stds) ** 2 + sigma**2)
        z = (x - alpha * mixture.means[:, 0]) / spread
        return (mixture.weights * torch.special.ndtr(z)).sum(1, keepdim=True)

    want, low, high = cdf(x, t), torch.full_like(x, -40.0), torch.full_like(x, 40.0)
    for _ in range(120):
        middle = (low + high) / 2
        below = cdf(middle, s) < want
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def test_mixture_flow_map_by_quantiles_is_the_ode() -> None:
    process = Flow()
    mixture = Mixture(process, [0.3, 0.7], [[-1.2], [0.8]], [0.25, 0.35])
    golden = [
        (0.9, 0.2, 0.7097166769),
        (0.9, -1.0, -1.2421267699),
        (1.0, 0.0, 0.6019179123),
        (1.0, 1.0, 1.0624732567),
    ]
    t, x, want = (torch.tensor(c, dtype=F64) for c in zip(*golden, strict=True))
    got = quantile_map(mixture, x[:, None], t, torch.zeros_like(t))
    assert torch.allclose(got[:, 0], want, atol=2e-10)
    # The exact map obeys the Eulerian condition with the mixture's own velocity, by differences of the map.
    t, s = torch.tensor([0.7, 0.55], dtype=F64), torch.tensor([0.2, 0.0], dtype=F64)
    x = torch.tensor([[0.3], [-0.4]], dtype=F64)
    v, h = mixture(x, t).velocity(), 1e-5
    ahead = quantile_map(mixture, x + h * v, t + h, s)
    behind = quantile_map(mixture, x - h * v, t - h, s)
    assert ((ahead - behind) / (2 * h)).abs().max() < 1e-7
    # And one teacher step followed by the map is the map, up to the solver's error, which halves twice.
    errors = []
    for gap in (0.1, 0.05):
        u = t - gap
        mid = solver_step(mixture, x, t, u, solver="heun")
        errors.append(float((quantile_map(mixture, mid, u, s) - quantile_map(mixture, x, t, s)).abs().max()))
    assert errors[1] < 0.2 * errors[0] < 2e-3


def test_chord_is_progressive_distillations_target() -> None:
    process, teacher = Flow(), gaussian(Flow(), MEAN, STD)
    t, mid, s = (torch.tensor([v], dtype=F64) for v in (0.8, 0.6, 0.4))
    x = torch.tensor([[0.5]], dtype=F64)
    z_mid = teacher(x, t).at(mid)
    z_s = teacher(z_mid, mid).at(s)
    assert math.isclose(float(z_mid), 0.5544554455, abs_tol=1e-10)
    assert math.isclose(float(z_s), 0.6181545540, abs_tol=1e-10)
    assert math.isclose(float(tr.chord_x0(process, x, t, z_s, s)), 0.7363091081, abs_tol=1e-10)
    assert math.isclose(float(flow_map(process, MEAN, STD, x, t, s)), 0.6288725036, abs_tol=1e-10)
    with pytest.raises(ValueError, match="length 0"):
        tr.chord_x0(process, x, t, z_s, t)


@pytest.mark.parametrize("name", FOUR)
def test_a_step_with_the_chord_lands_on_its_end(name: str) -> None:
    process = FOUR[name]
    t, _, s = times(process)
    x, end = noisy(process, t, name, "a"), noisy(process, s, name, "b")
    x0 = tr.chord_x0(process, x, t, end, s)
    landed = from_raw(process, "x0", x, t, x0).at(s)
    # EDM starts at sigma = 57, where the division by a difference of ratios costs digits.
    assert torch.allclose(landed, end, atol=1e-10)


def test_average_velocity_of_meanflow() -> None:
    process, x = Flow(), torch.tensor([[0.5], [0.5]], dtype=F64)
    t, s = torch.tensor([0.6, 0.6], dtype=F64), torch.tensor([0.2, 0.0], dtype=F64)
    student, teacher = ExactMap(process), gaussian(process, MEAN, STD)
    raw = tr.raw_of(student, "velocity")
    want = torch.tensor([[-0.4842328803], [-0.5695240963]], dtype=F64)
    assert torch.allclose(raw(x, t, s), want, atol=1e-10)
    v = teacher(x, t).velocity()
    moved = tr.tangent(raw, (x, t, s), (v, torch.ones_like(t), None))
    # In flow coordinates the target with gain -1 is v - (t - s) du/dt.
    residual = tr.eulerian(tr.slopes(process, "velocity", t, s, "t"), x, v, raw(x, t, s), moved)
    target = tr.toward_raw(raw(x, t, s), residual, -1.0)
    assert torch.allclose(target, v - (t - s)[:, None] * moved, atol=1e-12)
    assert torch.allclose(target, want, atol=1e-9)


@pytest.mark.parametrize(
    ("student", "warmup", "want"),
    [
        ("zero", 1.0, -0.3277575700),
        ("zero", 0.0, -0.2303728069),
        ("teacher", 1.0, 0.0988647999),
        ("exact", 1.0, 0.0),
    ],
)
def test_scm_tangent_in_trigflow(student: str, warmup: float, want: float) -> None:
    # sigma_d = .5 of the golden numbers becomes 1 on data divided by it: mean 1.4, std .8, x .4.
    process, sd = Trig(), 0.5
    teacher = gaussian(process, MEAN / sd, STD / sd)
    t, x = torch.tensor([0.9], dtype=F64), torch.tensor([[0.2 / sd]], dtype=F64)
    s = torch.zeros_like(t)

    def answer(x: Tensor, t: Tensor) -> Tensor:
        if student == "zero":
            return torch.zeros_like(x)
        if student == "teacher":
            return teacher(x, t).raw("trig")
        moved = flow_map(process, MEAN / sd, STD / sd, x, t, torch.zeros_like(t))
        return from_raw(process, "x0", x, t, moved).raw("trig")

    v = teacher(x, t).velocity()
    one = torch.ones_like(t)
    moved = tr.tangent(lambda x, t, s: answer(x, t), (x, t, s), (v, one, None))
    residual = tr.eulerian(tr.slopes(process, "trig", t, s, "t"), x, v, answer(x, t), moved, warmup)
    g = sd * torch.cos(t)[:, None] * residual
    assert math.isclose(float(g), want, abs_tol=1e-9)
    if student == "exact":
        assert math.isclose(float(answer(x, t)), -0.9522166903, abs_tol=1e-9)


@pytest.mark.parametrize("mode", ["jvp", "central", "semi"])
def test_tangent_modes_agree(mode: str) -> None:
    torch.manual_seed(0)
    net = Denoiser(MLP(3, 20, 3, 0, ("s",)).double(), Flow(), "velocity", "angle")
    net.net.extras["s"].linear.weight.data.normal_(0, 0.1)
    t, s = torch.tensor([0.7, 0.4], dtype=F64), torch.tensor([0.2, 0.1], dtype=F64)
    x, dx = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)

    # The border casts angles to float32, which would drown a small difference; call the network itself.
    def raw(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return net.net(x, t, extras={"s": s})[0]

    along = (dx, torch.ones_like(t), None)
    want = tr.tangent(raw, (x, t, s), along, "jvp")
    got = tr.tangent(raw, (x, t, s), along, mode, 1e-4)
    assert want.abs().min() > 1e-3
    assert torch.allclose(got, want, rtol=0, atol=2e-3 if mode == "semi" else 1e-5)
    assert not got.requires_grad


class _Silent(torch.autograd.Function):
    """A layer whose forward rule returns nothing useful: the trap that the probe is for."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.sin(x)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def jvp(ctx: object, dx: Tensor) -> Tensor:
        return torch.zeros_like(dx)


class _Broken(MLP):
    def forward(self, x: Tensor, time: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, dict[str, Tensor]]:
        out, features = super().forward(x, time, *args, **kwargs)  # type: ignore[arg-type]
        return _Silent.apply(out), features


def test_probe_accepts_sound_networks_and_refuses_a_silent_zero() -> None:
    torch.manual_seed(1)
    t, s = torch.tensor([0.7, 0.4, 0.2], dtype=F64), torch.tensor([0.3, 0.1, 0.0], dtype=F64)
    x = torch.randn(3, 5)
    good = Denoiser(MLP(5, 24, 3, 0, ("s",)), Flow(), "velocity", "angle")
    assert tr.probe(good, x, t, s) < 0.02
    # Attention, and an output layer that starts at zero.
    image = torch.randn(3, 2, 4, 6)
    dit = Denoiser(DiT((2, 4, 6), 2, 16, 2, 2), Flow(), "velocity", "angle")
    before = {n: p.clone() for n, p in dit.named_parameters()}
    assert tr.probe(dit, image, t, s) < 0.05
    assert all(torch.equal(p, before[n]) for n, p in dit.named_parameters())
    with pytest.raises(UserError, match="disagree by 100%"):
        tr.probe(Denoiser(_Broken(5, 24, 3), Flow(), "velocity", "angle"), x, t, s)


@pytest.mark.parametrize("mode", ["jvp", "central", "semi"])
def test_a_tangent_is_taken_in_full_precision(mode: tr.Tangent) -> None:
    """Under bfloat16 a difference is off by a third and more, and convolutions have no rule for forward mode there."""
    torch.manual_seed(3)
    inner = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 2, 3, padding=1))

    def raw(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return inner(bc(t, x).to(x.dtype) * x)

    x, t = torch.randn(4, 2, 6, 6), torch.tensor([0.8, 0.5, 0.4, 0.3])
    way = (torch.randn(4, 2, 6, 6), torch.ones_like(t), None)
    want = tr.tangent(raw, (x, t, 0 * t), way, mode)
    with torch.autocast("cpu", torch.bfloat16):
        assert inner(x).dtype == torch.bfloat16
        assert torch.equal(tr.tangent(raw, (x, t, 0 * t), way, mode), want)


def test_a_network_in_half_precision_is_told_apart_from_a_silent_zero() -> None:
    torch.manual_seed(4)
    net = Rescheduled(load_denoiser("assets:digits-teacher"), Flow())
    t, x, label = torch.tensor([0.7, 0.4, 0.2], dtype=F64), torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    assert tr.probe(net, x, t, 0 * t, label) < 0.1
    with pytest.raises(UserError, match=r"is in half precision .* set teacher.dtype=fp32"):
        tr.probe(net.bfloat16(), x, t, 0 * t, label)


def test_further_inputs_start_without_effect_and_then_matter() -> None:
    torch.manual_seed(2)
    plain = Denoiser(MLP(3, 16, 3), EDM(), "edm", "angle")
    more = Denoiser(MLP(3, 16, 3), EDM(), "edm", "angle")
    more.load_state_dict(plain.state_dict())
    more.add_inputs(("s", "w", "mirror"))
    t, x = torch.tensor([1.5, 0.3], dtype=F64), torch.randn(2, 3)
    s, w = torch.tensor([0.2, 0.1], dtype=F64), torch.tensor([4.0, 2.0], dtype=F64)
    assert torch.equal(plain(x, t).x0, more(x, t, s=s, w=w, mirror=torch.ones_like(w)).x0)
    for name, call in (("s", {"s": s}), ("w", {"w": w}), ("mirror", {"mirror": torch.ones_like(w)})):
        nn.init.normal_(more.net.extras[name].linear.weight)
        assert (plain(x, t).x0 - more(x, t, **call).x0).abs().max() > 1e-3
        nn.init.zeros_(more.net.extras[name].linear.weight)
    with pytest.raises(ValueError, match="does not take s"):
        plain(x, t, s=s)


@pytest.mark.parametrize("name", FOUR)
def test_boundary_by_construction(name: str) -> None:
    process = FOUR[name]
    torch.manual_seed(3)
    net = Denoiser(MLP(3, 16, 3, 0, ("s",)), process, "trig", "angle")
    t = process.grid(torch.tensor([0.9, 0.2, 0.05], dtype=F64))
    x = torch.randn(3, 3)
    assert torch.equal(jump(net, x, t, t), x)


def test_bounded_and_adaptive() -> None:
    d = Draws(3, torch.arange(4))
    g = d.normal(2, 5, dtype=F64) * torch.tensor([1e-3, 1.0, 1e3, 1e6], dtype=F64).view(-1, 1, 1)
    small = tr.bounded(g, 0.1)
    norms = small.flatten(1).norm(dim=1)
    assert bool((norms < 1).all())
    assert torch.allclose(norms, g.flatten(1).norm(dim=1) / (g.flatten(1).norm(dim=1) + 0.1))
    rms = g.flatten(1).norm(dim=1) / math.sqrt(10)
    assert torch.allclose(tr.bounded(g, 0.1, "rms"), g / (rms + 0.1).view(-1, 1, 1))
    # Power 0 is the mean square error, and power 1 has gradients of size 2 e / (|e|^2 + c) / numel.
    error = g[:2].clone().requires_grad_(True)
    assert torch.allclose(tr.adaptive(error, 0.0), (error**2).mean())
    (gradient,) = torch.autograd.grad(tr.adaptive(error, 1.0, 0.01), error)
    mean_square = (error**2).flatten(1).mean(1)
    assert torch.allclose(gradient, (2 * error / (mean_square + 0.01).view(-1, 1, 1) / error.numel()).detach())


def test_a_target_keeps_the_share_of_its_decay() -> None:
    target, source = nn.Linear(1, 1), nn.Linear(1, 1)
    for net, value in ((target, 1.0), (source, 0.0)):
        nn.init.constant_(net.weight, value)
        nn.init.constant_(net.bias, 2 * value)
    tr.follow(target, source, 0.9)
    assert target.weight.item() == pytest.approx(0.9)
    assert target.bias.item() == pytest.approx(1.8)
    assert source.weight.item() == 0.0


def test_distances_are_their_closed_forms() -> None:
    a, b = torch.zeros(1, 4, dtype=F64), torch.full((1, 4), 3.0, dtype=F64)
    # Of the root mean square: sqrt(9 + 16) - 4; of the norm it would be sqrt(36 + 16) - 4.
    assert float(tr.distance(a, b, "huber_sample", 4.0)) == 1.0
    b[0, 1:] = 0
    assert float(tr.distance(a, b, "huber_sample", 2.0)) == pytest.approx((9 / 4 + 4) ** 0.5 - 2)
    assert float(tr.distance(a, b, "huber", 4.0)) == pytest.approx(1 / 4)
    assert float(tr.distance(a, b, "mse")) == pytest.approx(9 / 4)
    assert float(tr.distance(a, b, "l1")) == pytest.approx(3 / 4)
    weight = torch.tensor([2.0])
    assert float(tr.distance(a, b, "mse", weight=weight)) == pytest.approx(9 / 2)


def test_the_warm_up_leaves_the_velocity_error_alone() -> None:
    t = torch.tensor([0.4, 0.9], dtype=F64)
    slope = tr.slopes(Flow(), "velocity", t, 0 * t, "t")
    x, v, raw, draw = (torch.full((2, 1), value, dtype=F64) for value in (1.7, 2.0, 0.5, -0.3))
    # J = x - (t - s) raw: dJ/dt = v - raw - (t - s) draw, of which only the last is faded.
    assert tr.eulerian(slope, x, v, raw, draw, warmup=0.0).tolist() == [[1.5], [1.5]]
    for warmup in (0.25, 1.0):
        wanted = 1.5 + warmup * 0.3 * t[:, None]
        torch.testing.assert_close(tr.eulerian(slope, x, v, raw, draw, warmup), wanted, rtol=1e-12, atol=0)


def test_a_target_of_the_raw_output_has_no_gradient() -> None:
    raw, residual = (torch.tensor(v, dtype=F64, requires_grad=True) for v in ([[1.0, 2.0]], [[3.0, -1.0]]))
    for gain in (0.5, torch.tensor([0.5], dtype=F64)):
        target = tr.toward_raw(raw, residual, gain)
        assert not target.requires_grad
        assert target.tolist() == [[-0.5, 2.5]]
