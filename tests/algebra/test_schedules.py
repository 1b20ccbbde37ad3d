"""Curricula, target sets and boundaries of the papers, by their published numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from trajectory_helpers import F64, MEAN, STD, draws, noisy

from fewstep.algebra.jump import solver_step
from fewstep.algebra.pairings import (
    CTGrid,
    ECTPairs,
    Grid,
    ICTGrid,
    ct_decay,
    ct_points,
    ect_lower,
    ect_ratio,
    ict_points,
    ict_weights,
)
from fewstep.algebra.process import EDM, Flow
from fewstep.algebra.sampling import Sampler, dynamic_guidance, sample
from fewstep.algebra.times import Uniform, ddim_levels
from fewstep.methods.icd import boundaries
from fewstep.methods.imm import IMM
from fewstep.methods.progressive import Progressive
from fewstep.methods.segments import Segments
from fewstep.methods.shortcut import Shortcut
from fewstep.methods.tdd import TDD, target_set
from fewstep.networks.analytic import flow_map, gaussian


@pytest.mark.parametrize(("step", "points"), [(0, 2), (1000, 6), (100_000, 54), (400_000, 107), (800_000, 151)])
def test_ct_grid_grows_as_published(step: int, points: int) -> None:
    assert ct_points(step, 800_000) == points


@pytest.mark.parametrize(("points", "decay"), [(2, 0.9), (10, 0.97915), (50, 0.99579), (151, 0.99861)])
def test_ct_decay_follows_the_grid(points: int, decay: float) -> None:
    assert round(ct_decay(points), 5) == decay


@pytest.mark.parametrize(("step", "points"), [(0, 11), (50_000, 21), (100_000, 41), (200_000, 161), (400_000, 1281)])
def test_ict_grid_doubles(step: int, points: int) -> None:
    assert ict_points(step, 400_000) == points


def test_ict_weights_are_a_discretised_lognormal() -> None:
    process = EDM()
    weights = ict_weights(process, 41, -1.1, 2.0)
    t = process.grid(torch.linspace(0, 1, 41, dtype=F64))
    cumulative = torch.special.ndtr((torch.log(t) + 1.1) / 2.0)
    want = (cumulative[1:] - cumulative[:-1]) / (cumulative[-1] - cumulative[0])
    assert torch.allclose(weights, want, atol=1e-12)
    assert abs(float(weights.sum()) - 1) < 1e-12


@pytest.mark.parametrize(
    ("ratio", "want"),
    [
        (0.5, (0, 0, 0.4732, 0.5)),
        (0.75, (0, 0.2121, 0.7366, 0.75)),
        (0.9, (0.52, 0.6848, 0.8946, 0.9)),
        (0.99, (0.952, 0.9685, 0.9895, 0.99)),
        (0.999, (0.9952, 0.9968, 0.9989, 0.999)),
    ],
)
def test_ect_lower_time(ratio: float, want: tuple[float, ...]) -> None:
    sigma = torch.tensor([0.1, 1.0, 5.0, 80.0], dtype=F64)
    assert torch.allclose(ect_lower(sigma, ratio) / sigma, torch.tensor(want, dtype=F64), atol=5e-5)


def test_ect_stages_close_in() -> None:
    assert [ect_ratio(k) for k in (0, 1, 2)] == [0.5, 0.75, 0.875]
    assert ect_ratio(30) == 0.999
    assert ect_ratio(0, q=4) == 0.75


@pytest.mark.parametrize("pairing", [Grid(points=9), CTGrid(total=100), ICTGrid(total=100), ECTPairs()])
@pytest.mark.parametrize("process", [EDM(), Flow()], ids=["edm", "flow"])
def test_pairs_are_ordered_and_inside(pairing: object, process: object) -> None:
    for step in (0, 50, 100, 1000):
        t, u = pairing.sample(draws(400, step), process, step)  # type: ignore[attr-defined]
        low = float(process.grid(torch.zeros(1, dtype=F64)))  # type: ignore[attr-defined]
        assert bool((u < t).all())
        # Nothing stands between the clean sample and the lowest level: ECT's r = 0 is the sample itself.
        assert bool(((u >= low) | (u == 0)).all())
        assert float(t.max()) <= process.t_max  # type: ignore[attr-defined]


def test_tdd_target_set() -> None:
    published = [0, 127, 143, 167, 199, 251, 287, 335, 375, 399, 431, 499, 571, 599, 627, 667, 715, 751]
    assert target_set() == [*published, 799, 835, 859, 875]


def test_tdd_targets_lie_below_the_teachers_step() -> None:
    method, members = TDD(), set(target_set())
    t, t_n, s = method.indices(draws(5000, "tdd"))
    assert bool((s <= t_n).all())
    assert torch.equal(t_n, (t - 4).clamp_min(0))
    exact = TDD(shrink=0.0).indices(draws(5000, "tdd"))
    assert set(exact[2].tolist()) <= members
    # Only members at most 260 below the largest allowed one are drawn, and all of those are.
    high = torch.tensor([max(m for m in members if m <= int(k)) for k in exact[1]])
    assert int((high - exact[2]).max()) <= 260
    assert len(set(exact[2].tolist())) == len(members)


def test_icd_boundaries_and_dynamic_guidance() -> None:
    assert boundaries() == ([0, 259, 519, 779], [259, 519, 779, 999])
    scales = [dynamic_guidance(u, 8.0, 0.4, 0.8) for u in (0.3, 0.4, 0.5, 0.6, 0.8, 0.9)]
    assert scales == pytest.approx([8, 8, 6.25, 4.5, 1, 1], abs=1e-12)
    assert ddim_levels(250)[:2] == (0.004, 0.008)


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_segments_do_not_cross_their_edge(segments: int) -> None:
    method = Segments(segments=segments, knots=64, skip=5)
    t, u, s = method.levels(draws(3000, segments))
    edge = torch.floor((t - 1e-9) * segments) / segments
    assert bool((edge <= s).all())
    assert bool((s <= u).all())
    assert bool((u < t).all())
    at_edge = Segments(segments=segments, knots=64, skip=5, to="edge").levels(draws(3000, segments))
    assert torch.allclose(at_edge[2], torch.floor((at_edge[0] - 1e-9) * segments) / segments)
    assert method.sampler().steps[0] == 1.0
    assert len(method.sampler().steps) == segments


def test_progressive_and_shortcut_grids() -> None:
    class Rows:
        draws = draws(2000, "pd")

    t, mid, s = Progressive(steps=4).times(Rows(), Flow())  # type: ignore[arg-type]
    assert sorted(set(t.tolist())) == [0.25, 0.5, 0.75, 1.0]
    assert torch.allclose(t - s, torch.full_like(t, 0.25))
    assert torch.allclose(t - mid, torch.full_like(t, 0.125))
    t, mid, s = Shortcut(finest=16).jumps(draws(4000, "sc"))
    assert set((t - s).tolist()) == {1.0, 0.5, 0.25, 0.125}
    assert torch.allclose(t - mid, (t - s) / 2)
    assert torch.equal((t / (t - s)).round(), t / (t - s))


def test_imm_times_are_shared_and_ordered() -> None:
    class Rows:
        draws = draws(64, "imm")

    method = IMM(particles=4)
    t, u, s = method.triple(Rows(), Flow())  # type: ignore[arg-type]
    assert torch.equal(t.reshape(16, 4), t[::4, None].expand(16, 4))
    assert bool(((s <= u) & (u <= t)).all())
    # eta falls by a 2^k-th of its range, which ends at t = .994, where neither the floor s nor the gap stops it.
    near = u > t - 1.001e-4
    free = (u > s) & ~near
    gap = t / (1 - t) - u / (1 - u)
    assert torch.allclose(gap[free], torch.full_like(gap[free], 0.994 / 0.006 / 2**12), rtol=1e-6)
    assert int(free.sum()) > 40
    # Above t = .95 the rule alone brings u nearer than 1e-4, which half precision cannot tell from t.
    late, found = Uniform(low=0.97, high=0.994), {}
    for gap in (0.0, 1e-4):
        Rows.draws = draws(64, "imm")
        t, u, s = IMM(particles=4, times=late, gap=gap).triple(Rows(), Flow())  # type: ignore[arg-type]
        found[gap] = float((t - u)[t - s > 1e-3].max()), float((t - u)[t - s > 1e-3].min())
    assert found[0.0][0] < 0.5e-4
    assert found[1e-4] == pytest.approx((1e-4, 1e-4), rel=1e-9)


@pytest.mark.parametrize(("points", "slope"), [(3, 8.005443547e-4), (18, 0.00420761882), (40, 0.004637682257)])
def test_euler_steps_of_the_teacher_chain_to_the_karras_product(points: int, slope: float) -> None:
    process = EDM()
    teacher = gaussian(process, MEAN, STD)
    levels = process.grid(torch.linspace(1, 0, points, dtype=F64))
    start = x = torch.tensor([[MEAN], [MEAN + 1.0]], dtype=F64)
    for t, s in pairwise(levels):
        x = solver_step(teacher, x, t.expand(2), s.expand(2), solver="euler")
    assert abs(float(x[1] - x[0]) - slope) < 1e-12
    # The continuous map of the same grid is the printed .005, which no finite chain reaches.
    end = flow_map(process, MEAN, STD, start, levels[:1].expand(2), levels[-1:].expand(2))
    assert abs(float(end[1] - end[0]) - 0.005) < 1e-6
    assert float(end[1] - end[0]) > slope + 3e-4


def test_consistency_training_has_the_euler_step_as_its_mean() -> None:
    # E[x0 + u eps | x_t] by quadrature over x0 against one Euler step of the exact teacher.
    process, t, u = EDM(), 1.5, 0.5
    teacher = gaussian(process, MEAN, STD)
    x = torch.tensor([2.0], dtype=F64)
    x0 = torch.linspace(-4, 6, 20_001, dtype=F64)
    density = torch.exp(-((x0 - MEAN) ** 2) / (2 * STD**2) - (x - x0) ** 2 / (2 * t**2))
    mean = ((x0 + u * (x - x0) / t) * density).sum() / density.sum()
    step = solver_step(teacher, x[:, None], x * 0 + t, x * 0 + u, solver="euler")
    assert abs(float(mean - step)) < 1e-10
    assert abs(float(step) - 1.1908713693) < 1e-10


def test_noise_correction_keeps_the_start_noise() -> None:
    process = Flow()
    teacher = gaussian(process, MEAN, STD)
    z = draws(5, "z").normal(1, dtype=F64)
    levels = (1.0, 0.6)
    plain = sample(Sampler(kind="map", steps=levels), teacher, z)
    kept = sample(Sampler(kind="map", steps=levels, keep_noise=True), teacher, z)
    # At alpha = 0 the predicted noise is the start noise, so the correction changes nothing there.
    assert torch.allclose(plain, kept, atol=1e-12)
    # Where alpha > 0 it does, and in the first of three steps alone: by hand for z = 1.3.
    z, low = torch.full((1, 1), 1.3, dtype=F64), (0.9, 0.6, 0.3)
    corrected = sample(Sampler(kind="map", steps=low, keep_noise=True), teacher, z)

    def at(level: float) -> torch.Tensor:
        return torch.full((1,), level, dtype=F64)

    x = process.prior(z, at(0.9))
    x = 0.4 * teacher(x, at(0.9)).x0 + 0.6 * z
    x = teacher(x, at(0.6)).at(at(0.3))
    assert torch.allclose(corrected, teacher(x, at(0.3)).x0, rtol=1e-12)
    assert float(corrected) == pytest.approx(1.00619423, abs=1e-8)
    assert noisy(process, torch.tensor([0.5], dtype=F64)).shape == (1, 1)
