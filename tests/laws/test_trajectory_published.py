"""Published settings of trajectory methods: schedules, weights and conditions written out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trajectory_helpers import F64, MEAN, STD, Batch64, ExactMap, draws

from fewstep.algebra.pairings import CTGrid, ECTPairs
from fewstep.algebra.prediction import Prediction, from_raw, from_x0
from fewstep.algebra.process import EDM, Flow, Trig
from fewstep.algebra.sampling import Sampler, dynamic_guidance, way_point
from fewstep.algebra.times import HalfLogNormal
from fewstep.methods.consistency import Consistency
from fewstep.methods.ctm import CTM
from fewstep.methods.icd import ICD
from fewstep.methods.imm import IMM, mmd2
from fewstep.methods.meanflow import MeanFlow
from fewstep.methods.scm import SCM
from fewstep.methods.segments import Segments
from fewstep.methods.shortcut import Shortcut
from fewstep.methods.std import STD as SingleTrajectory
from fewstep.networks.analytic import gaussian
from fewstep.networks.parts import Site
from fewstep.networks.roles import Roles
from fewstep.networks.specs import MLPSpec
from fewstep.objectives.legs import Scales, check_scale, drawn, ends, middle
from fewstep.objectives.trajectory import tangent


class Scaled(nn.Module):
    """x0 = slope x everywhere; it writes down the times that it is asked for."""

    takes_s, inputs = False, ()

    def __init__(self, process: Any, slope: float = 0.3) -> None:
        super().__init__()
        self.process, self.slope = process, nn.Parameter(torch.tensor(slope, dtype=F64))
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        self.asked.append(t)
        return from_x0(self.process, x, t, self.slope * x)


def only(losses: Any) -> Any:
    (one,) = list(losses)
    return one


def test_ects_rows_without_a_lower_neighbour_take_the_clean_sample() -> None:
    # ECT, eq. 10 and 12: r(t) = max(0, t - t (1 - rho) (1 + 8 sigmoid(-t))), rho = 1/2 in stage 0; |f(x_t) - f(x_r)|
    # / (t - r), whose target at r = 0 is the sample itself.
    n, student = 64, Scaled(EDM())
    method = Consistency(source="data", pairing=ECTPairs(), distance="huber_sample", c=1e-8, weight="gap")
    loss = only(method.losses(Roles(student=student), Batch64.of(n, 3), 0))["consistency"]
    batch = Batch64.of(n, 3)
    t = ECTPairs().times.sample(batch.draws, EDM())
    r = (t - 0.5 * t * (1 + 8 / (1 + torch.exp(t)))).clamp_min(0)
    clean = r <= 0.002
    assert int(clean.sum()) > 20
    noise, x0 = batch.noise(), batch.data()
    below = torch.where(clean[:, None], x0, 0.3 * (x0 + r[:, None] * noise))
    size = (0.3 * (x0 + t[:, None] * noise) - below).pow(2).mean(1).sqrt()
    want = (size / (t - torch.where(clean, 0 * r, r))).mean()
    assert abs(float(loss.detach() / want) - 1) < 1e-6
    # The lowest level of EDM in its place was another loss.
    low = torch.where(clean, 0 * t + 0.002, r)
    old = torch.where(clean[:, None], x0 + 0.002 * noise, below)
    size = (0.3 * (x0 + t[:, None] * noise) - old).pow(2).mean(1).sqrt()
    assert abs(float((size / (t - low)).mean() / want) - 1) > 1e-3
    # No network is asked below the process's lowest level.
    assert min(float(t.min()) for t in student.asked) >= 0.002


def test_cts_first_decay_is_a_field() -> None:
    plain, imagenet = (Consistency(source="data", pairing=CTGrid(**k), target_decay="ct") for k in ({}, {"decay": 0.95}))
    # mu(k) = exp(s0 ln mu0 / N(k)), N(0) = 2, N(100k) = 54.
    for step, points in ((0, 2), (100_000, 54)):
        assert abs(plain.decay(step) - 0.9 ** (2 / points)) < 1e-12
        assert abs(imagenet.decay(step) - 0.95 ** (2 / points)) < 1e-12
    with pytest.raises(ValueError, match=r"decay must lie in \(0, 1\), not 1"):
        CTGrid(decay=1.0)


def test_scales_are_a_number_a_range_or_a_list() -> None:
    assert drawn(4.5, draws(3)) == 4.5
    assert drawn((2.0, 2.0), draws(3)) == 2.0
    inside = drawn((5.0, 6.0), draws(400))
    assert isinstance(inside, Tensor)
    assert 5 < float(inside.min()) < 5.1 < 5.9 < float(inside.max()) < 6
    listed = drawn(Scales(of=(4.0, 4.5, 5.0)), draws(3000))
    assert isinstance(listed, Tensor)
    for value in (4.0, 4.5, 5.0):
        assert abs(float((listed == value).double().mean()) - 1 / 3) < 5 * (2 / 9 / 3000) ** 0.5
    icd = Scales(of=(20.0, 1.0, 8.0, 16.0, 12.0))
    assert (middle(icd), ends(icd)) == (12.0, (1.0, 20.0))
    assert (middle((5.0, 6.0)), middle(3.0)) == (5.5, 3.0)
    with pytest.raises(ValueError, match="a range low, high"):
        check_scale((3.0, 2.0))
    with pytest.raises(ValueError, match="give at least one scale"):
        Scales(of=())


def test_icd_starts_its_encoder_at_index_19_and_drops_its_guidance_at_one_level() -> None:
    method = ICD(guidance=Scales(of=(1.0, 8.0, 20.0)), embed_guidance=True, dynamic=(0.7, 0.7))
    assert (method.preserve_forward, method.preserve_reverse) == (1.5, 1.5)
    zero = torch.zeros(2, dtype=F64)
    assert method.begin(zero, Flow()).tolist() == [0.02, 0.02]
    assert method.begin(zero + 0.5, Flow()).tolist() == [0.5, 0.5]
    assert method.sampler().guidance == 20.0
    assert [dynamic_guidance(u, 20.0, 0.7, 0.7) for u in (0.69, 0.7, 0.71)] == [20.0, 20.0, 1.0]
    with pytest.raises(ValueError, match="start must lie in the first knot"):
        ICD(start=0.05)


def test_ctms_legs_have_lengths_by_their_probability_and_stay_on_the_grid() -> None:
    method, process, counts = CTM(points=5), Flow(), torch.zeros(5)
    for k in range(400):
        t, u, s, steps = method.legs(draws(16, "legs", k), process)
        counts[steps] += 1
        index = torch.stack((t, u, s)) * 4
        assert float((index - index.round()).abs().max()) < 1e-12
        assert torch.allclose(t - u, torch.full_like(t, steps / 4))
        assert bool(((s >= 0) & (s <= u)).all())
    # P(n) = n / 10 for n = 1..4: five standard errors.
    for n in range(1, 5):
        p = n / 10
        assert abs(float(counts[n]) / 400 - p) < 5 * (p * (1 - p) / 400) ** 0.5
    # s takes every index from the clean end to u itself.
    t, u, s, steps = CTM(points=3).legs(draws(500, "all"), process)
    assert set(zip((2 * u).tolist(), (2 * s).tolist(), strict=True)) >= {(0.0, 0.0)}


def test_ctm_carries_both_ends_with_its_average_and_rests_at_the_exact_map(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fewstep.networks.analytic import flow_map
    from fewstep.objectives.legs import Teacher

    monkeypatch.setattr(Teacher, "step", lambda self, x, t, s: flow_map(self.process, MEAN, STD, x, t, s))
    method = CTM(points=6, denoise_weight=0.0)
    assert method.needs().roles == {"teacher", "student", "target"}
    assert "target" in method.needs().frozen
    who = Roles(teacher=gaussian(Flow(), MEAN, STD), student=ExactMap(Flow()), target=ExactMap(Flow()))
    assert float(only(method.losses(who, Batch64.of(12, 3)))["consistency"]) < 1e-12
    # The average alone decides where both are carried: another one gives another loss for a wrong student.
    wrong = Scaled(Flow())
    values = []
    for target in (Scaled(Flow(), 0.1), Scaled(Flow(), 0.9)):
        who = Roles(teacher=gaussian(Flow(), MEAN, STD), student=wrong, target=target)
        loss = only(method.losses(who, Batch64.of(12, 3)))["consistency"]
        loss.backward()
        assert target.slope.grad is None
        values.append(float(loss.detach()))
    assert abs(values[0] - values[1]) > 1e-3


def test_ctms_gamma_is_the_papers() -> None:
    sampler = CTM(gamma=0.6, steps=(1.0, 0.5)).sampler()
    assert sampler.kind == "gamma"
    # The way to s leads through sqrt(1 - gamma^2) (s - sigma_min) + sigma_min, .8 of it for gamma = .6.
    s = torch.tensor([3.0], dtype=F64)
    assert abs(float(way_point(EDM(), s, sampler.eta)) - (0.8 * 2.998 + 0.002)) < 1e-12
    # TCD's eta of the same size is another point.
    assert abs(float(way_point(EDM(), s, 0.6)) - 1.2012) < 1e-12
    assert CTM().sampler().kind == "map"
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], not 1\.5"):
        CTM(gamma=1.5)


def test_half_lognormal_is_half_of_each() -> None:
    law, process = HalfLogNormal(), EDM()
    t = law.sample(draws(20_000, "half"), process)
    edge = process.grid(torch.tensor(0.3, dtype=F64))
    # ln sigma ~ N(-1.2, 1.2^2) below the uniform half's lowest level, half of that probability in all.
    below = 0.5 * (1 + math.erf((math.log(float(edge)) + 1.2) / 1.2 / math.sqrt(2)))
    assert abs(float((t < edge).double().mean()) - 0.5 * below) < 5 * (0.25 / 20_000) ** 0.5
    high = process.grid(torch.tensor(0.9, dtype=F64))
    assert abs(float((t > high).double().mean()) - 0.5 / 7) < 5 * (0.07 / 20_000) ** 0.5


def test_shortcuts_finest_legs_are_asked_where_flow_matching_trains() -> None:
    asked: list[Tensor] = []

    class Listening(Scaled):
        takes_s = True

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, s: Any = None, **call: Any) -> Prediction:
            asked.append(torch.stack((t, s)))
            return super().forward(x, t)

    method, finest = Shortcut(finest=8, counts=(1, 2, 4), target_decay=None), torch.tensor([True, True, False, False])
    leg = method.leg(Listening(Flow()), None, finest)
    t = torch.tensor([1.0, 0.5, 0.25, 1.0], dtype=F64)
    s = t - torch.tensor([1 / 8, 1 / 8, 1 / 4, 1 / 2], dtype=F64)
    x = torch.ones(4, 1, dtype=F64)
    moved = leg(x, t, s)
    assert asked[0][1].tolist() == [1.0, 0.5, 0.0, 0.5]
    # They still move all the way.
    assert torch.equal(moved, Scaled(Flow())(x, t).at(s))
    with pytest.raises(ValueError, match="counts powers of two below it"):
        Shortcut(finest=8, counts=(8,))


def test_imms_loss_is_the_papers_on_two_groups() -> None:
    # IMM, eq. 12 and 13 with the choices for ImageNet: k = 12, a = 2, b = 4, on t <= .994.
    method, n, m = IMM(particles=4, drop_cond=0.0), 8, 4
    student = Scaled(Flow())
    loss = only(method.losses(Roles(student=student), Batch64.of(n, 3)))["mmd"]
    batch = Batch64.of(n, 3)
    t, u, s = method.triple(batch, Flow())
    x0, eps = batch.data(), batch.noise()
    want = 0.0
    for g in (0, 1):
        rows, ti, ui, si = slice(g * m, g * m + m), float(t[g * m]), float(u[g * m]), float(s[g * m])

        def jump(a: float, b: float, rows: slice = rows) -> Tensor:
            x = (1 - a) * x0[rows] + a * eps[rows]
            clean = 0.3 * x
            return (1 - b) * clean + b * (x - (1 - a) * clean) / a

        here, there = jump(ti, si), jump(ui, si)

        def mean(a: Tensor, b: Tensor, gap: float = ti - si) -> float:
            total = 0.0
            for i in range(m):
                for j in range(m):
                    total += math.exp(-math.sqrt(max(float(((a[i] - b[j]) ** 2).sum()), 1e-16)) / 3 / gap)
            return total / m**2

        snr = 2 * math.log((1 - ti) / ti)
        rate = 2 / ti + 2 / (1 - ti)
        weight = 0.5 / (1 + math.exp(snr - 4)) * rate * (1 - ti) ** 2 / ((1 - ti) ** 2 + ti**2)
        want += weight * (mean(here, here) + mean(there, there) - 2 * mean(here, there)) / 2
    assert abs(float(loss.detach()) / want - 1) < 1e-6
    # The two settings of CIFAR-10 give another weight.
    other = only(IMM(particles=4, a=1, b=5.0, drop_cond=0.0).losses(Roles(student=student), Batch64.of(n, 3)))
    assert abs(float(other["mmd"].detach()) / want - 1) > 1e-2
    assert float(mmd2(x0[None, :4], x0[None, :4], "laplace", torch.ones(1, dtype=F64))) == 0
    assert method.sampler().steps == (0.994,)


def test_imm_drops_labels_in_a_tenth_of_the_rows() -> None:
    seen: list[Tensor] = []

    class Labelled(Scaled):
        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
            seen.append(cond)
            return super().forward(x, t)

    n = 4000
    batch = Batch64.of(n, 1)
    batch.cond, batch.null_cond = torch.zeros(n, dtype=torch.long), torch.ones(n, dtype=torch.long)
    only(IMM(particles=4).losses(Roles(student=Labelled(Flow())), batch))
    assert abs(float(seen[0].double().mean()) - 0.1) < 5 * (0.09 / n) ** 0.5
    assert torch.equal(seen[0], seen[1])


def test_stds_destinations_lie_below_the_teachers_step() -> None:
    method = SingleTrajectory()
    # The start is index ceil(50 * .75) = 38 of the DDIM grid, knot 39, level .78.
    assert method.first == 39
    knot = torch.full((4000,), 39)
    s = method.destination(draws(4000, "std"), knot)
    assert set(s.tolist()) == set(range(19, 38))
    assert set(method.destination(draws(500, "std"), torch.full((500,), 3)).tolist()) == {0, 1}
    assert set(method.destination(draws(50, "std"), torch.ones(50, dtype=torch.long)).tolist()) == {0}
    assert SingleTrajectory(strength=1.0).first == 50
    with pytest.raises(ValueError, match=r"steps \[1\.0\] begin above level 0\.78"):
        SingleTrajectory(steps=(1.0,))


def test_pcms_phases_begin_at_knots() -> None:
    method = Segments(segments=4, knots=50, to="edge", guidance=(5.0, 6.0))
    assert method.edges() == [0, 12, 25, 37]
    # Indices 239, 499 and 739 of the table, (index + 1) / 1000 as levels.
    assert method.sampler().steps == (1.0, 0.74, 0.5, 0.24)
    t, u, s = (v * 50 for v in method.levels(draws(5000, "pcm")))
    for k in range(1, 51):
        want = max(e for e in (0, 12, 25, 37) if e <= k - 1)
        assert set(s[t.round() == k].round().tolist()) == {want}
    assert torch.allclose(t - u, torch.ones_like(t))
    with pytest.raises(ValueError, match="segments 9 must not exceed the 8 knots"):
        Segments(segments=9, knots=8)


@pytest.mark.parametrize("mode", ["central", "semi"])
def test_finite_differences_stay_inside_the_process(mode: Any) -> None:
    asked: list[Tensor] = []

    def raw(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        asked.append(t)
        return (t[:, None] - s[:, None]) ** 2 + 0 * x

    t = torch.tensor([1.0, 0.998, 0.5, 1.0, 1.0, 0.004], dtype=F64)
    s = torch.tensor([0.0, 0.3, 0.2, 0.998, 1.0, 0.0], dtype=F64)
    x = torch.zeros(6, 1, dtype=F64)
    got = tangent(raw, (x, t, s), (None, torch.ones_like(t), None), mode, floor=s, ceiling=1.0)[:, 0]
    assert max(float(a.max()) for a in asked) <= 1.0
    assert all(bool((a >= s - 1.001e-4).all()) for a in asked)
    # One-sided differences of a parabola are off by the step, central ones exact.
    assert torch.allclose(got, 2 * (t - s), rtol=0, atol=5.1e-3)
    assert not bool(torch.isnan(got).any())


def test_meanflow_and_freeflow_ask_no_network_beyond_the_prior() -> None:
    class Map(ExactMap):
        latest = 0.0

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
            Map.latest = max(Map.latest, float(t.max()), float(call["s"].max()) if call.get("s") is not None else 0.0)
            return super().forward(x, t, cond, **call)

    from fewstep.methods.freeflow import FreeFlow

    who = Roles(teacher=gaussian(Flow(), MEAN, STD), student=Map(Flow()))
    for mode in ("central", "semi"):
        only(MeanFlow(source="teacher", apart=1.0, tangent=mode).losses(who, Batch64.of(400, 1), 1))
    only(FreeFlow(correction=0.0, tangent="central").losses(who, Batch64.of(400, 1)))
    assert Map.latest <= 1.0


def test_meanflow_drops_labels_where_s_is_t() -> None:
    n = 8000
    batch = Batch64.of(n, 1)
    batch.cond, batch.null_cond = torch.zeros(n, dtype=torch.long), torch.ones(n, dtype=torch.long)
    t = torch.full((n,), 0.5, dtype=F64)
    s = torch.where(torch.arange(n) % 4 == 0, 0 * t, t)
    dropped = MeanFlow(drop_cond=0.1).dropped(batch, t, s) == 1
    assert not bool(dropped[s != t].any())
    assert abs(float(dropped.double().mean()) - 0.1) < 5 * (0.09 / n) ** 0.5
    anywhere = MeanFlow(drop_cond=0.1, drop_at="any").dropped(batch, t, s) == 1
    assert bool(anywhere[s != t].any())


def test_a_network_may_be_told_the_length_of_its_jump() -> None:
    net: Any = MLPSpec(width=8, depth=2, inputs=("length",)).build(Site((2,), 0, {}, 0)).double()
    assert net.takes_s
    torch.nn.init.normal_(net.net.extras["length"].linear.weight, std=0.3)
    x = draws(3, "length").normal(2, dtype=F64)
    t, s = torch.tensor([0.9, 0.6, 0.5], dtype=F64), torch.tensor([0.2, 0.6, 0.0], dtype=F64)
    angle = torch.atan2(t, 1 - t) - torch.atan2(s, 1 - s)
    told: list[Tensor] = []
    net.net.extras["length"].register_forward_pre_hook(lambda module, given: told.append(given[0]))
    moved, still = net(x, t, s=s), net(x, t)
    assert torch.allclose(told[0].double(), angle, atol=1e-6)
    # Left out, the jump has no length: MeanFlow's v(x, t) = u(x, t, 0).
    assert torch.equal(told[1], torch.zeros(3))
    assert torch.equal(moved.x0[1], still.x0[1])
    assert float((moved.x0 - still.x0).abs()[0].max()) > 1e-3


def test_tbcms_route_is_the_shifted_one_and_calls_the_teacher_once_a_point() -> None:
    method = SCM(source="trajectory", weighting="one")
    edges = method.route()
    assert len(edges) == 16
    assert edges[0] == Trig.t_max - 1e-4
    assert edges == sorted(edges, reverse=True)
    # t = atan(s / (1 - s)), s = 2.5 u / (1 + 1.5 u), u from 1 to the shifted 1 / 1000 in 15 steps.
    u = 1 - (1 - 2.5e-3 / 1.0015) * 4 / 15
    s = 2.5 * u / (1 + 1.5 * u)
    assert abs(edges[4] - math.atan(s / (1 - s))) < 1e-12
    # Half of the points see noise above t = 1.2, where a route of even steps in t has a quarter.
    teacher = Scaled(Trig())
    points = list(method.points_of(Roles(teacher=teacher, student=Scaled(Trig())), Batch64.of(400, 1)))
    assert len(teacher.asked) == len(points) + 1 == 16
    high = torch.stack([t for _, t, _ in points]) > 1.2
    assert abs(float(high.double().mean()) - 0.49) < 0.02
    # Each point is where the teacher's last velocity has led.
    (x, t, v), (y, r, _) = points[:2]
    step = (t - r)[:, None]
    assert torch.allclose(y, torch.cos(step) * x - torch.sin(step) * v, atol=1e-12)


def test_an_embedded_scale_is_the_teachers_own_and_the_students_input() -> None:
    heard: list[Tensor] = []

    class Told(nn.Module):
        process, takes_s, inputs = Trig(), False, ("w",)

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, w: Any = None, **call: Any) -> Prediction:
            heard.append(w)
            return from_raw(self.process, "trig", x, t, 0.1 * x * w[:, None])

    class Guided(nn.Module):
        process, takes_s, inputs = Trig(), False, ()

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
            return from_raw(self.process, "trig", x, t, x + cond.double()[:, None])

    n = 30
    batch = Batch64.of(n, 2)
    batch.cond, batch.null_cond = torch.ones(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    method = SCM(guidance=Scales(of=(4.0, 4.5, 5.0)), embed_guidance=True, weighting="one", tangent="central")
    roles = Roles(teacher=Guided(), student=Told())
    only(method.losses(roles, batch, 5))
    assert set(heard[0].tolist()) == {4.0, 4.5, 5.0}
    again = Batch64.of(n, 2)
    again.cond, again.null_cond = batch.cond, batch.null_cond
    scale = drawn(method.guidance, again.draws)
    ((x, _, v),) = method.points_of(roles, again, scale)
    assert torch.equal(heard[0], scale)
    # uncond + w (cond - uncond) of F = x + cond.
    assert torch.allclose(v, x + scale[:, None], atol=1e-12)  # type: ignore[index]
    assert method.sampler().guidance == 4.5
    assert Sampler().guidance is None
