"""Methods that become one another by a switch do so number for number."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from trajectory_helpers import F64, MEAN, STD, Batch64, ExactMap, draws

from fewstep.algebra.jump import ask, jump, solver_step
from fewstep.algebra.noising import add_noise
from fewstep.algebra.pairings import Grid
from fewstep.algebra.process import EDM, VP, Flow, Process, Trig
from fewstep.methods.bank import Bank
from fewstep.methods.consistency import Consistency
from fewstep.methods.icd import ICD
from fewstep.methods.imm import IMM, mmd2
from fewstep.methods.kd import KD
from fewstep.methods.mdt import MDT
from fewstep.methods.meanflow import MeanFlow
from fewstep.methods.progressive import Progressive
from fewstep.methods.scm import SCM
from fewstep.methods.segments import Segments
from fewstep.methods.sfd import SFD
from fewstep.methods.std import STD as SingleTrajectory
from fewstep.methods.tdd import TDD
from fewstep.networks.analytic import gaussian
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles
from fewstep.objectives import mse, trajectory as tr
from fewstep.objectives.legs import Teacher, student_leg, time_between


def network(process: Process, prediction: str, inputs: tuple[str, ...] = ()) -> Denoiser:
    torch.manual_seed(5)
    net = Denoiser(MLP(3, 12, 3, 0, inputs), process, prediction, "angle").double()
    for name in inputs:
        net.net.extras[name].linear.weight.data.normal_(0, 0.2)
    return net


def gradient(loss: Tensor, net: torch.nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()), allow_unused=False)])


def only(losses: Any) -> Tensor:
    (one,) = list(losses)
    return one.total()


@pytest.fixture(autouse=True)
def double_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks take their angles in float64 here, so that equal formulas agree to the last digits."""
    original = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args == (torch.float32,) and self.dtype == F64:
            return self
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)


def test_one_segment_to_its_edge_is_a_consistency_model() -> None:
    process = Flow()
    student = network(process, "velocity")
    who = Roles(teacher=gaussian(process, MEAN, STD), student=student)
    cm = Consistency(pairing=Grid(points=17), solver="ddim")
    tscd = Segments(segments=1, knots=16, to="edge")
    a, b = only(cm.losses(who, Batch64.of(9, 3), 0)), only(tscd.losses(who, Batch64.of(9, 3)))
    assert float(a) > 1e-6
    assert torch.allclose(a, b, rtol=1e-10)
    assert torch.allclose(gradient(a, student), gradient(b, student), rtol=1e-8, atol=1e-12)


def consistency_by_hand(who: Roles, x: Tensor, t: Tensor, u: Tensor, **how: Any) -> Tensor:
    """The CM loss at given points, written out."""
    batch = Batch64.of(len(t), 3)
    zero = 0 * t
    target = tr.two_leg(Teacher(who.teacher, batch).step, student_leg(who.student, None), x, t, u, zero)
    return tr.distance(ask(who.student, x, t, zero).at(zero), target, **how)


def test_tdd_std_and_icd_with_a_clean_target_are_consistency_models(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Flow()
    student = network(process, "velocity")
    who = Roles(teacher=gaussian(process, MEAN, STD), student=student)
    huber: Any = {"kind": "huber", "c": 1e-3}
    index = torch.tensor([3, 7, 499, 999, 251, 11, 899, 643, 47])
    below = index - 4

    monkeypatch.setattr(TDD, "indices", lambda self, d: (index, below.clamp_min(0), 0 * index))
    batch = Batch64.of(9, 3)
    t = (index.double() + 1) / 1000
    u = torch.where(below > 0, (below.double() + 1) / 1000, torch.zeros(9, dtype=F64))
    x, _ = add_noise(process, batch.data(), Batch64.of(9, 3).noise(), t)
    got = only(TDD(guidance=1.0, drop_cond=0.0).losses(who, Batch64.of(9, 3)))
    assert torch.allclose(got, consistency_by_hand(who, x, t, u, **huber), rtol=1e-10)

    method = SingleTrajectory(slots=9, knots=8, rate=0.0, target="clean", strength=1.0)
    holder = who.with_state(Bank(9, (3,)).double())
    x, _ = add_noise(process, batch.data(), Batch64.of(9, 3).noise(), torch.ones(9, dtype=F64))
    got = only(method.losses(holder, Batch64.of(9, 3)))
    one = torch.ones(9, dtype=F64)
    assert torch.allclose(got, consistency_by_hand(who, x, one, one - 1 / 8, **huber), rtol=1e-10)

    single = ICD(knots=10, count=1)
    both = Roles(teacher=who.teacher, student=student, forward=network(process, "velocity", ("s",)))
    (losses,) = list(single.losses(both, Batch64.of(9, 3)))
    d = Batch64.of(9, 3)
    k = d.draws.integers(10)
    t, u = (k + 1).double() / 10, k.double() / 10
    x, _ = add_noise(process, d.data(), d.noise(), t)
    assert torch.allclose(losses["decode"], consistency_by_hand(who, x, t, u, **huber), rtol=1e-10)


def test_meanflow_without_distance_is_flow_matching() -> None:
    process = Flow()
    student = network(process, "velocity", ("s",))
    method = MeanFlow(apart=0.0, power=0.0)
    got = only(method.losses(Roles(student=student), Batch64.of(11, 3), 0))
    batch = Batch64.of(11, 3)
    t, s = method.pair(batch, process)
    eps = batch.noise()
    x, _ = add_noise(process, batch.data(), eps, t)
    want = mse(student(x, t).velocity(), eps - batch.data())
    assert torch.equal(t, s)
    assert torch.allclose(got, want, rtol=1e-12)
    assert torch.allclose(gradient(got, student), gradient(want, student), rtol=1e-9, atol=1e-13)


def test_meanflow_to_the_clean_end_is_velocity_matching() -> None:
    process = Flow()
    who = Roles(teacher=gaussian(process, MEAN, STD), student=network(process, "velocity"))
    batch = Batch64.of(8, 3)
    t = torch.linspace(0.15, 0.95, 8, dtype=F64)
    x, _ = add_noise(process, batch.data(), batch.noise(), t)
    v, s = who.teacher(x, t).velocity(), 0 * t
    here = tr.raw_of(who.student, "velocity")
    moved = tr.tangent(here, (x, t, s), (v, torch.ones_like(t), None))
    residual = tr.eulerian(tr.slopes(process, "velocity", t, s, "t"), x, v, here(x, t, s), moved)
    target = tr.toward_raw(here(x, t, s), residual, -1.0)
    errors = []
    for step in (1e-3, 5e-4):
        _, theirs = MDT(step=step, slope_norm=None).target(who, batch, x, t, 1.0)
        errors.append(float((theirs - target).abs().max()))
    assert errors[0] < 0.1
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_imm_with_one_particle_is_consistency_training() -> None:
    process = Flow()
    student = network(process, "velocity", ("s",))
    method = IMM(particles=1, kernel="l2", weight="one", clean_end=True, k=6.0)
    got = only(method.losses(Roles(student=student), Batch64.of(10, 3)))
    batch = Batch64.of(10, 3)
    t, u, s = method.triple(batch, process)
    eps = batch.noise()
    x_t, x_u = (add_noise(process, batch.data(), eps, time)[0] for time in (t, u))
    with torch.no_grad():
        target = jump(student, x_u, u, s)
    # The l2 MMD of single points is twice their squared distance, summed over the 3 coordinates.
    want = 2 * 3 * mse(jump(student, x_t, t, s), target)
    assert float(want) > 1e-6
    assert torch.allclose(got, want, rtol=1e-9)


def test_mmd_is_zero_for_equal_groups_and_the_distance_of_means_for_l2() -> None:
    x, y = draws(6, "x").normal(4, 3, dtype=F64), draws(6, "y").normal(4, 3, dtype=F64)
    scale = torch.ones(6, dtype=F64)
    for kind in ("laplace", "l2"):
        assert float(mmd2(x, x, kind, scale).abs().max()) < 1e-12  # type: ignore[arg-type]
        assert torch.allclose(mmd2(x, x[:, [2, 0, 3, 1]], kind, scale), torch.zeros(6, dtype=F64), atol=1e-12)  # type: ignore[arg-type]
        assert float(mmd2(x, y, kind, scale).min()) > 1e-3  # type: ignore[arg-type]
    assert torch.allclose(mmd2(x, y, "l2", scale), 2 * ((x.mean(1) - y.mean(1)) ** 2).sum(-1), atol=1e-12)


class OneNoise(Batch64):
    """A batch with one noise, whenever it is asked: methods draw their times before or after it."""

    def noise(self) -> Tensor:
        return draws(len(self), "one noise").normal(*self.shape, dtype=F64)


@pytest.mark.parametrize(
    ("process", "prediction", "equal"),
    [(Flow(), "velocity", True), (Trig(), "trig", True), (VP(), "v", False), (EDM(), "edm", False)],
    ids=["flow", "trig", "vp", "edm"],
)
def test_progressive_phase_to_one_step_is_distillation_of_a_two_step_teacher(
    process: Process, prediction: str, equal: bool
) -> None:
    # Equal where the first level is pure noise (alpha = 0), as KD starts there and PD at noised data, and the last
    # one is clean (sigma = 0), where the chord's x0 is the state itself. VP breaks the first, EDM both.
    student = network(process, prediction)
    teacher = gaussian(process, MEAN, STD)
    who = Roles(teacher=teacher, student=student)
    kd = only(KD(teacher_steps=2, solver="ddim").losses(who, OneNoise.of(9, 3)))
    pd = only(Progressive(steps=1, of="teacher", weight="x0").losses(who, OneNoise.of(9, 3)))
    if not equal:
        assert not torch.allclose(kd, pd, rtol=1e-6)
        return
    assert float(kd.detach()) > 1e-3
    assert torch.allclose(kd, pd, rtol=1e-12)
    assert torch.allclose(gradient(kd, student), gradient(pd, student), rtol=1e-9, atol=1e-13)
    # A teacher with another number of steps is another target.
    other = only(KD(teacher_steps=3, solver="ddim").losses(who, OneNoise.of(9, 3)))
    assert not torch.allclose(other, pd, rtol=1e-6)


@pytest.mark.parametrize("process", [Flow(), EDM()], ids=["flow", "edm"])
def test_a_walk_takes_the_levels_of_a_sampler(process: Process) -> None:
    net = gaussian(process, MEAN, STD)
    levels = [process.grid(torch.full((9,), u, dtype=F64)) for u in (1.0, 0.75, 0.5, 0.25, 0.0)]
    x = process.prior(Batch64.of(9, 3).noise(), levels[0])
    walked = Teacher(net, Batch64.of(9, 3), solver="heun").walk(4)(x, levels[0], levels[-1])
    for t, s in pairwise(levels):
        x = solver_step(net, x, t, s, None, "heun")
    assert torch.allclose(walked, x, rtol=0, atol=1e-9)


def test_times_between_two_have_even_levels() -> None:
    process, n = EDM(), 40_000
    s, t = (process.grid(torch.full((n,), u, dtype=F64)) for u in (0.2, 0.9))
    u = process.level(time_between(process, draws(n, "between"), s, t))
    assert float(u.min()) > 0.2 - 1e-9
    assert float(u.max()) < 0.9 + 1e-9
    found = torch.histc(u, 7, 0.2, 0.9) / n
    # Seven standard errors of a share of 1/7.
    assert float((found - 1 / 7).abs().max()) < 7 * (6 / 49 / n) ** 0.5


def test_sfd_without_nodes_between_starts_at_zero() -> None:
    process = EDM()
    student = network(process, "edm")
    who = Roles(teacher=student_twin(student), student=student)
    for between, want_zero in ((0, True), (2, False)):
        method = SFD(counts=(3,), between=between, solver="euler")
        batch, held, values = Batch64.of(8, 3), None, []
        for turn in method.turns(who, 0):
            held = turn.batch(0) or batch
            values += [float(losses["follow"]) for losses in turn.losses(held)]
        assert len(values) == 3
        # The EDM grid ends at sigma_min, where one Euler step and one DDIM step are the same.
        assert (max(values) < 1e-10) is want_zero


def student_twin(student: Denoiser) -> Denoiser:
    return network(student.process, "edm")


def test_scm_on_edm_is_scm_on_trigflow() -> None:
    # EDM with sigma_data = 1 is TrigFlow: same input, same time angle, F_trig = -F_edm.
    edm = network(EDM(sigma_min=1e-6, sigma_max=1e6, sigma_data=1.0), "edm")
    trig = network(Trig(), "trig")
    trig.net.last.weight.data.neg_()
    trig.net.last.bias.data.neg_()
    method, grads, losses = SCM(warmup=10, weighting="one"), [], []
    for net in (edm, trig):
        who = Roles(teacher=gaussian(net.process, 0.3, 0.9), student=net)
        loss = only(method.losses(who, Batch64.of(9, 3), 4))
        losses.append(loss)
        grads.append(gradient(loss, net))
    assert float(losses[0]) > 1e-6
    assert torch.allclose(losses[0], losses[1], rtol=1e-6)
    size = sum(p.numel() for p in edm.net.last.parameters())
    # The last layer, whose sign is turned, has the opposite gradient; it stands before nothing else.
    names = [n for n, _ in edm.named_parameters()]
    sign = torch.cat(
        [
            torch.full((p.numel(),), -1.0 if n.startswith("net.last") else 1.0, dtype=F64)
            for n, p in edm.named_parameters()
        ]
    )
    assert size > 0
    assert any(n.startswith("net.last") for n in names)
    assert torch.allclose(grads[0], sign * grads[1], rtol=1e-4, atol=1e-9)


def test_bank_follows_the_teachers_rollout_bit_for_bit() -> None:
    process = Flow()
    method = SingleTrajectory(slots=4, knots=5, rate=1.0, reach=3)
    bank = Bank(4, (3,)).double()
    who = Roles(teacher=gaussian(process, MEAN, STD), student=ExactMap(process), state=bank)
    one = torch.ones(4, dtype=F64)
    x, _ = add_noise(process, Batch64.of(4, 3).data(), Batch64.of(4, 3).noise(), one)
    knots = []
    for k in range(4):
        list(method.losses(who, Batch64.of(4, 3)))
        t, u = one - k / 5, one - (k + 1) / 5
        x = Teacher(who.teacher, Batch64.of(4, 3)).step(x, process.grid(torch.full_like(one, (5 - k) / 5)), u)
        knots.append(bank.knot.clone())
        assert torch.allclose(bank.x, x, atol=1e-14)
        assert bool((t > u).all())
    assert [int(k[0]) for k in knots] == [4, 3, 2, 0]
