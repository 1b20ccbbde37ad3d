"""Targets of single methods written out by hand: SCFM, MeanFlow, TwinFlow's guidance and sCM's direction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trajectory_helpers import F64, MEAN, STD, Batch64, ExactMap, draws

from fewstep.algebra.prediction import Prediction, from_raw, from_x0
from fewstep.algebra.process import Flow, Process, Trig
from fewstep.methods.meanflow import MeanFlow
from fewstep.methods.scfm import SCFM
from fewstep.methods.scm import SCM
from fewstep.methods.twinflow import TwinFlow
from fewstep.networks.analytic import Mixture, flow_map, gaussian
from fewstep.networks.roles import Roles


def only(losses: Any) -> Tensor:
    (one,) = list(losses)
    return one.total()


def slope(loss: Tensor, p: nn.Parameter) -> float:
    (value,) = torch.autograd.grad(loss, p)
    return float(value)


class Moved(nn.Module):
    """A denoiser whose velocity is moved by theta cos(2 x); theta = 0 leaves it."""

    inputs = ("s",)

    def __init__(self, inner: nn.Module, theta: float = 0.0) -> None:
        super().__init__()
        self.inner, self.process, self.takes_s = inner, Flow(), getattr(inner, "takes_s", False)
        self.theta = nn.Parameter(torch.tensor(theta, dtype=F64))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        v = self.inner(x, t, cond, **call).velocity()
        return from_raw(self.process, "velocity", x, t, v + self.theta * torch.cos(2 * x))


class Straight(nn.Module):
    """The field of the reflowed pairs (z, m + s z), whose paths are lines."""

    process, inputs, takes_s = Flow(), (), False

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        z = (x - (1 - t)[:, None] * MEAN) / ((1 - t) * STD + t)[:, None]
        return from_x0(self.process, x, t, MEAN + STD * z)


def velocity_by_hand(x: float, t: float, mean: float, std: float) -> float:
    variance = (1 - t) ** 2 * std**2 + t**2
    x0 = mean + (1 - t) * std**2 / variance * (x - (1 - t) * mean)
    return (x - x0) / t


def test_scfm_follows_two_euler_steps_of_the_teacher_or_of_its_average() -> None:
    assert abs(velocity_by_hand(0.5, 0.6, MEAN, STD) + 0.394190871) < 1e-9
    assert abs(0.5 - 0.4 * velocity_by_hand(0.5, 0.6, MEAN, STD) - 0.6576763485) < 1e-10
    n, method = 64, SCFM()
    student, target = gaussian(Flow(), 0.2, 0.9), gaussian(Flow(), -0.3, 0.6)
    who = Roles(teacher=gaussian(Flow(), MEAN, STD), student=student, target=target)
    got = only(method.losses(who, Batch64.of(n, 1)))
    batch = Batch64.of(n, 1)
    anchored, *times = method.nodes_of(batch)
    assert 0 < int(anchored.sum()) < n
    data, noise, errors = batch.data(), batch.noise(), []
    for i in range(n):
        high, middle, low = (float(t[i]) for t in times)
        law = (MEAN, STD) if bool(anchored[i]) else (-0.3, 0.6)
        x = (1 - high) * float(data[i]) + high * float(noise[i])
        first = velocity_by_hand(x, high, *law)
        there = x - (high - middle) * first
        end = there - (middle - low) * velocity_by_hand(there, middle, *law)
        errors.append((velocity_by_hand(x, high, 0.2, 0.9) - (x - end) / (high - low)) ** 2)
    assert abs(float(got) - sum(errors) / n) < 1e-12


def test_scfm_nodes_are_adjacent_where_anchored_and_a_power_of_two_apart_elsewhere() -> None:
    factor, n = 3.0, 4000
    anchored, *times = SCFM(shift=(factor, factor)).nodes_of(Batch64.of(n, 1))
    index = [32 * t / (factor - (factor - 1) * t) for t in times]
    assert all(float((k - k.round()).abs().max()) < 1e-9 for k in index)
    first, second, third = (k.round() for k in index)
    skip = first - second
    assert torch.equal(second - third, skip)
    assert (float(third.min()), float(first.max())) == (0, 32)
    assert set(skip[anchored].tolist()) == {1}
    assert set(skip[~anchored].tolist()) == {2, 4, 8}
    # Five standard errors of a share of .4.
    assert abs(float(anchored.double().mean()) - 0.4) < 5 * (0.24 / n) ** 0.5


@pytest.mark.parametrize("anchored", [0.0, 1.0])
def test_scfm_leaves_a_straight_field_at_rest_and_moves_a_curved_one(anchored: float) -> None:
    method, sizes = SCFM(anchored=anchored), {}
    for name, field in (("straight", Straight()), ("curved", gaussian(Flow(), MEAN, STD))):
        student = Moved(field)
        loss = only(method.losses(Roles(teacher=field, target=field, student=student), Batch64.of(40, 3)))
        sizes[name] = (float(loss.detach()), abs(slope(loss, student.theta)))
    assert max(sizes["straight"]) < 1e-12
    assert min(sizes["curved"]) > 1e-6
    wrong = Moved(Straight(), 0.1)
    loss = only(method.losses(Roles(teacher=Straight(), target=Straight(), student=wrong), Batch64.of(40, 3)))
    assert slope(loss, wrong.theta) > 1e-2


class Posterior(Batch64):
    """Rows whose (data, noise) are symmetric quantiles of the pair given one x at time t: their mean is exact."""

    x, t = 0.5, 0.6

    def data(self) -> Tensor:
        alpha, n = 1 - self.t, len(self)
        rho2 = alpha**2 * STD**2 + self.t**2
        mean = MEAN + alpha * STD**2 / rho2 * (self.x - alpha * MEAN)
        q = torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n)
        return (mean + STD * self.t / rho2**0.5 * q)[:, None]

    def noise(self) -> Tensor:
        return (self.x - (1 - self.t) * self.data()) / self.t


@pytest.mark.parametrize("s", [0.0, 0.2, 0.6])
def test_meanflows_target_from_pairs_is_unbiased(s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 40
    times = (torch.full((n,), Posterior.t, dtype=F64), torch.full((n,), s, dtype=F64))
    monkeypatch.setattr(MeanFlow, "pair", lambda self, batch, process: times)
    # Power 0 is the plain square, whose gradient averages raw - target over the pairs that share this x.
    method, values = MeanFlow(power=0.0), []
    for theta in (0.0, 0.1):
        student = Moved(ExactMap(Flow()), theta)
        loss = only(method.losses(Roles(student=student), Posterior.of(n, 1), 0))
        values.append((float(loss.detach()), abs(slope(loss, student.theta))))
    assert values[0][1] < 1e-12
    # Each pair by itself is far off: it is the mean alone that is right.
    assert values[0][0] > 1e-2
    assert values[1][1] > 1e-3


class GuidedField(nn.Module):
    """Class-conditional velocities of a mixture with the scale 2.5 built in; unconditional where cond is null."""

    takes_s, inputs = True, ("s",)

    def __init__(self, inner: Mixture, scale: float) -> None:
        super().__init__()
        self.process, self.inner, self.scale = Flow(), inner, scale

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        empty = self.inner(x, t, torch.full_like(cond, 2)).velocity()
        v = empty + self.scale * (self.inner(x, t, cond).velocity() - empty)
        return from_raw(self.process, "velocity", x, t, v)


@pytest.mark.parametrize(("x", "t"), [(0.1, 0.5), (-0.6, 0.3), (1.2, 0.75)])
def test_meanflows_guided_target_is_unbiased_for_the_field_of_scale_omega_over_one_minus_kappa(
    x: float, t: float
) -> None:
    weights, means, stds = (0.3, 0.7), (-1.2, 0.8), (0.25, 0.35)
    mix = Mixture(Flow(), weights, [[m] for m in means], stds, [0, 1])
    omega, kappa = 0.2, 0.92
    method, who = MeanFlow(guidance=omega, kappa=kappa), Roles(student=GuidedField(mix, omega / (1 - kappa)))
    x0 = torch.linspace(-5, 5, 4001, dtype=F64)[:, None]
    n = len(x0)
    rows, times = torch.full((n, 1), x, dtype=F64), torch.full((n,), t, dtype=F64)
    pair = (rows - (1 - t) * x0) / t - x0
    likelihood = torch.exp(-((rows - (1 - t) * x0) ** 2) / (2 * t**2))
    parts = [w / s * torch.exp(-((x0 - m) ** 2) / (2 * s**2)) for w, m, s in zip(weights, means, stds, strict=True)]
    null = torch.full((n,), 2)
    for label, density in enumerate((*parts, parts[0] + parts[1])):
        cond = torch.full((n,), label)
        batch = Batch64(draws(n), (1,), x0, cond, null)
        v = method.velocity(who, batch, cond, rows, times, pair, omega, None)
        mean = (v * likelihood * density).sum() / (likelihood * density).sum()
        here = [mix(rows[:1], times[:1], torch.tensor([c])).velocity() for c in (label, 2)]
        want = float(here[1] + 2.5 * (here[0] - here[1]))
        assert abs(float(mean) - want) < 1e-9
        # Rows without a condition follow the plain pair.
        assert torch.equal(v, pair) is (label == 2)
    # Above the paper's t = .75 every row follows the plain pair.
    late = times.clamp_min(0.7501)
    batch = Batch64(draws(n), (1,), x0, 0 * null, null)
    assert torch.equal(method.velocity(who, batch, 0 * null, rows, late, pair, omega, None), pair)


class Labelled(ExactMap):
    """The exact map whose x0 is moved by a tenth of the class; it takes the mirrored side of time."""

    inputs = ("s", "mirror")

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        return from_x0(self.process, x, t, super().forward(x, t, **call).x0 + 0.1 * cond.double()[:, None])


def labelled(index: Tensor) -> Batch64:
    d = draws(len(index), "twin")
    d.index = index
    x0 = MEAN + STD * d.normal(3, dtype=F64)
    return Batch64(d, (3,), x0, index // 4 % 2, torch.full_like(index, 2))


def test_twinflow_enhances_guidance_between_the_ends_of_time_only() -> None:
    process, share = Flow(), 0.75
    who = Roles(student=Labelled(process), target=Labelled(process))
    method, plain = TwinFlow(guidance_share=share, rectify=0.0), TwinFlow(rectify=0.0)
    batch = labelled(torch.arange(16))
    group, t, _ = method.groups(batch)
    x, v = batch.noise(), batch.noise()
    got = method.velocity(who, batch, x, t, group, v)
    # v = (x - x0) / t, so a class whose x0 is lower by .1 k moves faster by .1 k / t; the null class is the second.
    push = share * 0.1 * (2 - batch.cond).double() / t
    inner = (group == 1) | (group == 2)
    want = v + torch.where(inner, push, 0 * push)[:, None]
    assert torch.allclose(got, want, rtol=0, atol=1e-12)
    assert torch.equal(got[~inner], v[~inner])
    assert torch.equal(plain.velocity(who, batch, x, t, group, v), v)
    without = Batch64(batch.draws, batch.shape, batch.x0)
    assert torch.equal(method.velocity(who, without, x, t, group, v), v)
    # And so in the loss: one step from noise and the mirrored side do not see the share.
    for k in range(4):
        index = 4 * torch.arange(6) + k
        a, b = (only(m.losses(who, labelled(index))) for m in (plain, method))
        assert float(a) > 1e-3
        assert torch.equal(a, b) is (k in (0, 3))


def trig_answer(student: str, process: Process, mean: float, std: float) -> Any:
    teacher = gaussian(process, mean, std)

    def raw(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if student == "zero":
            return torch.zeros_like(x)
        if student == "teacher":
            return teacher(x, t).raw("trig")
        return from_raw(process, "x0", x, t, flow_map(process, mean, std, x, t, 0 * t)).raw("trig")

    return raw


@pytest.mark.parametrize("tangent", ["jvp", "central"])
@pytest.mark.parametrize(
    ("student", "warmup", "golden"),
    [
        ("zero", 1.0, -0.3277575700),
        ("zero", 0.0, -0.2303728069),
        ("teacher", 1.0, 0.0988647999),
        ("exact", 1.0, 0.0),
    ],
)
def test_scms_direction_is_the_bounded_golden_tangent(student: str, warmup: float, golden: float, tangent: Any) -> None:
    # The golden numbers have sigma_d = .5; divided by it, data and g have sigma_d = 1.
    process, sd = Trig(), 0.5
    here = trig_answer(student, process, MEAN / sd, STD / sd)
    t, x = torch.tensor([0.9], dtype=F64), torch.tensor([[0.2 / sd]], dtype=F64)
    v, raw = gaussian(process, MEAN / sd, STD / sd)(x, t).velocity(), here(x, t, 0 * t)
    g = golden / sd
    for c, norm in ((0.1, "l2"), (0.7, "rms")):
        method = SCM(c=c, normalize=norm, tangent=tangent)
        got = float(method.direction(here, x, t, v, raw, warmup))
        assert abs(got - g / (abs(g) + c)) < (1e-8 if tangent == "jvp" else 1e-4)
    # Two equal coordinates have a norm sqrt(2) larger under l2 and the same one under rms.
    x, v = x.repeat(1, 2), v.repeat(1, 2)
    for norm, size in (("l2", 2**0.5 * abs(g)), ("rms", abs(g))):
        got = SCM(normalize=norm).direction(here, x, t, v, here(x, t, 0 * t), warmup)
        assert torch.allclose(got, torch.full_like(got, g / (size + 0.1)), rtol=0, atol=1e-8)


def test_scms_loss_moves_the_students_output_along_its_direction() -> None:
    class Free(nn.Module):
        """TrigFlow's F as one parameter per entry."""

        process, inputs, takes_s = Trig(), (), False

        def __init__(self) -> None:
            super().__init__()
            self.raw = nn.Parameter(draws(6, "free").normal(3, dtype=F64))

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
            return from_raw(self.process, "trig", x, t, self.raw)

    student, method = Free(), SCM(warmup=10, weighting="one")
    who = Roles(teacher=gaussian(Trig(), 0.3, 0.9), student=student)
    (got,) = torch.autograd.grad(only(method.losses(who, Batch64.of(6, 3), 5)), student.raw)
    ((x, t, v),) = method.points_of(who, Batch64.of(6, 3))
    # dF/dt = 0 for it, so that g is cos^2 t (v - F) - r sin t cos t x, and dL/dF = -2 w g / numel with w = 1 / tan t.
    c, s = torch.cos(t)[:, None], torch.sin(t)[:, None]
    g = c**2 * (v - student.raw.detach()) - 0.5 * s * c * x
    g = g / (g.norm(dim=1, keepdim=True) + 0.1)
    assert torch.allclose(got, -2 * g * c / s / g.numel(), rtol=1e-9)
