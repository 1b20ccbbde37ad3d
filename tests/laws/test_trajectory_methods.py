"""Every trajectory method is at rest at the exact flow map, and moves away from a wrong one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trajectory_helpers import F64, FOUR, MEAN, STD, TIGHT, Batch64, ExactMap, draws

from fewstep.algebra.jump import ask
from fewstep.algebra.pairings import Grid
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import Flow, Process, Trig
from fewstep.algebra.sampling import sample
from fewstep.methods.bank import Bank
from fewstep.methods.boot import BOOT
from fewstep.methods.consistency import Consistency
from fewstep.methods.ctm import CTM
from fewstep.methods.freeflow import FreeFlow
from fewstep.methods.icd import ICD, invert
from fewstep.methods.kd import KD
from fewstep.methods.mdt import MDT
from fewstep.methods.meanflow import MeanFlow
from fewstep.methods.reflow import Reflow, interpolate
from fewstep.methods.scm import SCM
from fewstep.methods.segments import Segments
from fewstep.methods.shortcut import Shortcut
from fewstep.methods.std import STD as SingleTrajectory
from fewstep.methods.tdd import TDD
from fewstep.methods.twinflow import TwinFlow
from fewstep.networks.analytic import flow_map, gaussian
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Teacher

CLEAN = {**FOUR, "edm": TIGHT}


@pytest.fixture
def exact_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher legs follow the exact flow map: a solver's error is not the method's."""

    def step(self: Teacher, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return flow_map(self.process, MEAN, STD, x, t, s)

    monkeypatch.setattr(Teacher, "step", step)


class Off(nn.Module):
    """The exact map with its x0 shifted: a student that is wrong."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.exact, self.process, self.takes_s, self.inputs = ExactMap(process), process, True, ("s",)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        right = self.exact(x, t, cond, **call)
        return from_x0(self.process, x, t, right.x0 + 0.05 * torch.cos(3 * x))


def roles(process: Process, **more: nn.Module) -> Roles:
    return Roles(teacher=gaussian(process, MEAN, STD), student=ExactMap(process), **more)


def values(method: Any, process: Process, step: int = 0, **more: Any) -> dict[str, float]:
    """Losses of a method at the exact map on 12 rows."""
    return _values(method, roles(process, **more), step)


def _values(method: Any, who: Roles, step: int = 0) -> dict[str, float]:
    batch = Batch64.of(12, 3)
    out: dict[str, float] = {}
    arguments = (who, batch, step) if "step" in method.losses.__code__.co_varnames else (who, batch)
    for losses in method.losses(*arguments):
        for name, value in losses.items():
            out[name] = max(out.get(name, 0.0), abs(float(value)))
    return out


LEGS = [
    KD(teacher_steps=2),
    Consistency(pairing=Grid(points=7)),
    CTM(points=None, compare="s", denoise_weight=0.0, reconstruction_weight=1.0, velocity_weight=1.0),
    TDD(guidance=1.0, drop_cond=0.0),
    Segments(segments=4, knots=16, skip=2),
    Segments(segments=2, knots=16, to="edge"),
    ICD(preserve_forward=1.0, preserve_reverse=1.0),
]


@pytest.mark.parametrize("method", LEGS, ids=lambda m: f"{m.name}-{getattr(m, 'segments', '')}")
@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.usefixtures("exact_steps")
def test_leg_methods_rest_at_the_exact_map(name: str, method: Any) -> None:
    process = CLEAN[name]
    forward = {"forward": ExactMap(process)} if isinstance(method, ICD) else {}
    got = values(method, process, **forward)
    assert got
    assert max(got.values()) < 1e-10, got
    wrong = Roles(
        teacher=gaussian(process, MEAN, STD),
        student=Off(process),
        **({"forward": Off(process)} if forward else {}),
    )
    assert max(_values(method, wrong).values()) > 1e-8


@pytest.mark.usefixtures("exact_steps")
def test_ctm_compared_at_the_clean_end_and_std_rest_at_the_exact_map() -> None:
    process = Flow()
    assert values(CTM(denoise_weight=0.0, target_decay=None), process)["consistency"] < 1e-12
    method = SingleTrajectory(slots=12, knots=10, reach=4, steps=(0.9,))
    who = roles(process, state=Bank(12, (3,)).double())
    for _ in range(3):
        assert _values(method, who)["consistency"] < 1e-12


CONTINUOUS = [
    (SCM(warmup=1, weighting="one"), Trig()),
    (SCM(warmup=1, weighting="one"), TIGHT),
    (SCM(warmup=1, weighting="one", fade="rcm", prior_weight=False), Trig()),
    (MeanFlow(source="teacher"), Flow()),
    (FreeFlow(correction=0.0), Flow()),
    (Shortcut(source="teacher", target_decay=None), Flow()),
]


@pytest.mark.parametrize(("method", "process"), CONTINUOUS, ids=lambda v: getattr(v, "name", ""))
def test_limits_rest_at_the_exact_map(method: Any, process: Process) -> None:
    got = values(method, process, step=5)
    assert max(got.values()) < 1e-8, got
    wrong = Roles(teacher=gaussian(process, MEAN, STD), student=Off(process))
    assert max(_values(method, wrong, 5).values()) > 1e-5


def test_tbcm_follows_the_teacher_and_rests_at_the_exact_map() -> None:
    method = SCM(source="trajectory", points=5, warmup=1, weighting="one", prior_weight=False)
    assert not method.needs().data
    who = roles(Trig())
    batch = Batch64.of(4, 3)
    seen = list(method.points_of(who, batch))
    times = torch.stack([t for _, t, _ in seen])
    assert len(seen) == 5
    assert bool((times[1:] < times[:-1]).all())
    assert _values(method, who, 5)["scm"] < 1e-12
    # A generator must not leave gradients switched off for whoever iterates it.
    for _ in method.points_of(who, batch):
        assert torch.is_grad_enabled()


def test_freeflow_golden_and_its_correction_rests_where_fake_is_real() -> None:
    z, s = torch.tensor([[0.3]], dtype=F64), torch.tensor([0.5], dtype=F64)
    one = torch.ones_like(s)
    answer = ExactMap(Flow())(z, one, s=s)
    assert abs(float(answer.at(s)) - 0.5115549442) < 1e-10
    assert abs(float(-answer.velocity()) - 0.4231098884) < 1e-10
    who = roles(Flow(), critic=gaussian(Flow(), MEAN, STD))
    assert _values(FreeFlow(), who)["correct"] < 1e-20
    shifted = Roles(**{**dict(who), "critic": gaussian(Flow(), MEAN + 0.1, STD)})
    _, gradient = FreeFlow().correct(shifted, Batch64.of(12, 3))
    # A student that sits to the right of the teacher is pushed back: x moves along minus the gradient.
    assert bool((gradient > 0).all())


def test_mdt_matching_is_exact_up_to_its_difference() -> None:
    errors = []
    for step in (0.02, 0.01, 0.005):
        method = MDT(step=step, slope_norm=None, distill_weight=0.0)
        t = torch.linspace(0.1, 0.95, 12, dtype=F64)
        batch = Batch64.of(12, 3)
        who = Roles(teacher=gaussian(Flow(), MEAN, STD), student=CleanEnd(Flow()))
        here, target = method.target(who, batch, batch.noise(), t, 1.0)
        errors.append(float((here - target).abs().max()))
    assert errors[0] < 0.1
    assert 1.7 < errors[0] / errors[1] < 2.3
    assert 1.7 < errors[1] / errors[2] < 2.3


class CleanEnd(nn.Module):
    """The exact map to the clean end for a network without a destination: velocity (x - x0) / t."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process, self.inputs, self.takes_s = process, (), False

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        return from_x0(self.process, x, t, flow_map(self.process, MEAN, STD, x, t, 0 * t))


def test_boot_recursion_follows_the_flow_map() -> None:
    process = Flow()
    teacher = gaussian(process, MEAN, STD)
    z = draws(16, "boot").normal(1, dtype=F64)
    one = torch.ones(16, dtype=F64)

    def exact(t: float) -> Tensor:
        return ExactMap(process)(z, one, s=t * one).x0

    def end(count: int) -> Tensor:
        y = teacher(z, one).x0
        for k in range(count):
            t, s = (1 - k / count) * one, (1 - (k + 1) / count) * one
            y = BOOT.advance(process, lambda x, t: teacher(x, t), y, z, t, s)
        return y

    coarse, fine = ((end(n) - exact(0.0)).abs().max() for n in (20, 40))
    assert 1.6 < coarse / fine < 2.4
    assert fine < 0.05
    # One bootstrap pair at the exact student is off by the second order of its step.
    got = [values(BOOT(step=d), process)["bootstrap"] ** 0.5 for d in (0.04, 0.02)]
    assert 3.0 < got[0] / got[1] < 5.0
    assert values(BOOT(), process)["boundary"] < 1e-20


def test_reflow_of_a_gaussian_is_straight() -> None:
    # Pairs (z, m + s z) of the exact map have velocity z (1 - s) - m all along their line.
    class Straight(nn.Module):
        process, inputs, takes_s = Flow(), (), False

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
            t = t[:, None]
            z = (x - (1 - t) * MEAN) / ((1 - t) * STD + t)
            return from_x0(self.process, x, t[:, 0], MEAN + STD * z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "step", lambda self, x, t, s: flow_map(self.process, MEAN, STD, x, t, s))
        who = Roles(teacher=gaussian(Flow(), MEAN, STD), student=Straight())
        assert _values(Reflow(), who)["reflow"] < 1e-12
        got = _values(Reflow(mode="distill", guide_weight=1.0, guide="teacher"), who)
        assert got["distill"] < 1e-12
        # The teacher's answer from the straight line is a mean, not the point: guidance pulls inward.
        assert got["guide"] > 1e-3
    z, xi = draws(20_000, "z").normal(1, dtype=F64), draws(20_000, "xi").normal(1, dtype=F64)
    for beta in (0.0, 0.3, 1.0):
        assert abs(float(interpolate(z, xi, beta).var()) - 1) < 0.03
    method = Reflow(anneal=100)
    assert [method.beta(k) for k in (0, 50, 100, 500)] == [1.0, 0.5, 0.0, 0.0]


class Signed(ExactMap):
    """The exact map that also takes the mirrored side of time and answers the same there."""

    inputs = ("s", "mirror")


def test_twinflow_rests_where_both_sides_agree() -> None:
    process = Flow()
    who = Roles(teacher=gaussian(process, MEAN, STD), student=Signed(process), target=Signed(process))
    batch = Batch64.of(12, 3)
    method = TwinFlow()
    group, t, s = method.groups(batch)
    assert torch.equal(group, torch.arange(12) % 4)
    assert bool((s <= t).all())
    assert bool((s[group == 3] == t[group == 3]).all())
    x = batch.noise()
    here = who.student(x, t, s=s).velocity().requires_grad_(True)
    loss = method.rectifier(who, batch, x, here, group)
    (gradient,) = torch.autograd.grad(loss, here)
    assert float(gradient.abs().max()) == 0
    # The any-step residual is the Eulerian one up to its step: it falls with the step length.
    v = gaussian(process, MEAN, STD)(x, t).velocity()
    later = torch.where(t - s > 0.2, s, t - 0.3).clamp_min(0)
    t = later + 0.3
    x = process.alpha(t)[:, None] * MEAN + batch.noise()
    v = gaussian(process, MEAN, STD)(x, t).velocity()
    here = who.student(x, t, s=later).velocity()
    errors = [
        float((method_.target(who, batch, x, t, later, v, here) - here).abs().max())
        for method_ in (TwinFlow(step=0.01, order=1), TwinFlow(step=0.005, order=1))
    ]
    assert errors[0] < 0.1
    assert 1.6 < errors[0] / errors[1] < 2.5
    # x0 and z of a prediction rebuild x_t.
    p = who.student(x, t, s=later)
    assert torch.allclose((1 - t)[:, None] * p.x0 + t[:, None] * p.eps, x, atol=1e-12)


@pytest.mark.usefixtures("exact_steps")
def test_inversion_and_decoding_are_inverse() -> None:
    method, process = ICD(), Flow()
    x = MEAN + STD * draws(9, "x").normal(1, dtype=F64)
    start = method.begin(torch.zeros(9, dtype=F64), process)
    noise = invert(method, ExactMap(process), x)
    assert torch.allclose(noise, flow_map(process, MEAN, STD, x, start, torch.ones(9, dtype=F64)), atol=1e-10)
    back = sample(method.sampler(), ExactMap(process), noise)
    assert torch.allclose(back, flow_map(process, MEAN, STD, x, start, torch.zeros(9, dtype=F64)), atol=1e-10)


def _steps() -> Iterator[Any]:
    yield from (Shortcut(), Segments(segments=4), KD(), TDD(eta=0.0))


@pytest.mark.parametrize("method", _steps(), ids=lambda m: m.name)
@pytest.mark.parametrize("name", CLEAN)
def test_samplers_of_exact_students_reach_the_exact_end(name: str, method: Any) -> None:
    process = CLEAN[name]
    z = draws(7, "z").normal(1, dtype=F64)
    got = sample(method.sampler(), ExactMap(process), z)
    top = process.grid(torch.ones(7, dtype=F64))
    want = flow_map(process, MEAN, STD, process.prior(z, top), top, process.grid(0 * top))
    assert torch.allclose(got, want, atol=1e-5 if name == "edm" else 1e-9)


def test_a_student_without_s_is_asked_without_it() -> None:
    student = CleanEnd(Flow())
    x, t = torch.zeros(2, 1, dtype=F64), torch.tensor([0.5, 0.9], dtype=F64)
    assert torch.equal(ask(student, x, t, 0.3 * t).x0, student(x, t).x0)
