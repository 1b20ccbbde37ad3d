"""Searched levels against brute force and golden numbers, and where the dynamic programme alone is no optimum."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from fitted_cases import MIXTURE, M, S, quantiles
from torch import Tensor

from fewstep.algebra.prediction import from_x0
from fewstep.algebra.process import EDM, Flow
from fewstep.algebra.searched import (
    Grid,
    cheapest,
    even_path,
    gap,
    jumps,
    nearest,
    polished,
    search_levels,
)
from fewstep.networks.analytic import Mixture, gaussian

ONE = torch.ones(1, 1, dtype=torch.float64)


def grid_of(name: str, points: int, top: float = 1.0, process: Any = None) -> Grid:
    process = process or Flow()
    levels = [top * (1 - i / points) for i in range(points)]
    if name == "gaussian":
        return Grid(gaussian(process, M, S), ONE, None, levels)
    return Grid(Mixture(process, *MIXTURE), quantiles(200), None, levels)


def brute(grid: Grid, calls: int) -> tuple[tuple[int, ...], float]:
    target = grid.trajectory()[0][-1]
    paths = ((0, *inner, grid.end) for inner in combinations(range(1, grid.end), calls - 1))
    return min(((p, gap(grid.replay(p), target)) for p in paths), key=lambda f: f[1])


@pytest.mark.parametrize(
    ("points", "calls", "path", "cost"),
    [
        (12, 3, (0, 7, 10, 12), 8.1845511279e-3),
        (12, 4, (0, 6, 8, 10, 12), 3.6053142367e-3),
        (20, 3, (0, 12, 16, 20), 1.1965349877e-2),
        (20, 5, (0, 9, 13, 16, 18, 20), 3.3984678686e-3),
    ],
)
def test_of_a_gaussian_the_programme_finds_the_optimum(points: int, calls: int, path: tuple[int, ...], cost: float):
    grid = grid_of("gaussian", points)
    states, _ = grid.trajectory()
    assert nearest(grid, states, calls) == path
    assert gap(grid.replay(path), states[-1]) == pytest.approx(cost, abs=1e-12)
    if points == 12:
        assert brute(grid, calls)[0] == path
        assert gap(grid.replay(even_path(3, 12)), states[-1]) == pytest.approx(1.7175194794e-2, abs=1e-11)


def test_of_a_mixture_the_programme_can_lose_to_even_levels_and_polishing_mends_it():
    grid = grid_of("mixture", 14)
    states, _ = grid.trajectory()
    found, even = nearest(grid, states, 4), even_path(4, 14)
    assert (found, even) == ((0, 5, 8, 10, 14), (0, 4, 7, 10, 14))
    costs = [gap(grid.replay(p), states[-1]) for p in (found, even)]
    assert costs == pytest.approx([3.0186035579e-2, 2.7206764837e-2], abs=1e-11)
    levels = [1 - i / 14 for i in range(14)]
    assert search_levels(Mixture(Flow(), *MIXTURE), quantiles(200), None, 4, levels) == even
    small = grid_of("mixture", 12)
    path = nearest(small, small.trajectory()[0], 4)
    assert path == (0, 4, 6, 8, 12) == brute(small, 4)[0]
    assert gap(small.replay(path), small.trajectory()[0][-1]) == pytest.approx(2.5305176255e-2, abs=1e-11)


@pytest.mark.parametrize(("points", "calls"), [(10, 2), (10, 4), (10, 5), (12, 4), (16, 3)])
def test_the_better_of_both_polished_paths_is_the_optimum(points: int, calls: int):
    grid = grid_of("mixture", points)
    target = grid.trajectory()[0][-1]
    levels = [1 - i / points for i in range(points)]
    path = search_levels(Mixture(Flow(), *MIXTURE), quantiles(200), None, calls, levels)
    want, cost = brute(grid, calls)
    assert gap(grid.replay(path), target) == pytest.approx(cost, rel=1e-9), (path, want)
    assert cost <= gap(grid.replay(even_path(calls, points)), target)


def test_the_reported_error_is_the_replayed_one():
    grid = grid_of("mixture", 10)
    target = grid.trajectory()[0][-1]
    path, error = polished(grid, even_path(3, 10), target)
    assert gap(grid.replay(path), target) == pytest.approx(error, rel=1e-12)


def test_all_nodes_are_the_fine_trajectory_and_one_call_has_one_path():
    net, levels = Mixture(Flow(), *MIXTURE), [1 - i / 8 for i in range(8)]
    for cost in ("path", "jump"):
        assert search_levels(net, quantiles(50), None, 8, levels, cost) == tuple(range(9))  # type: ignore[arg-type]
        assert search_levels(net, quantiles(50), None, 1, levels, cost) == (0, 8)  # type: ignore[arg-type]
    for calls in (0, 9):
        with pytest.raises(ValueError, match=rf"calls must lie in 1\.\.8, the number of points, not {calls}"):
            search_levels(net, quantiles(5), None, calls, levels)


def test_a_straight_flow_costs_nothing_on_any_grid():
    class Straight(torch.nn.Module):
        """A reflowed Gaussian: x0 = M + S z whatever the time."""

        process = Flow()

        def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Any:
            t_ = t[:, None]
            z = (x - (1 - t_) * M) / ((1 - t_) * S + t_)
            return from_x0(self.process, x, t, M + S * z)

    grid = Grid(Straight(), quantiles(9), None, [1 - i / 10 for i in range(10)])
    states, answers = grid.trajectory()
    assert max(jumps(grid, states, answers).values()) < 1e-12
    assert gap(grid.replay((0, 3, 4, 10)), states[-1]) < 1e-28


@pytest.mark.parametrize(("name", "path"), [("gaussian", (0, 9, 12, 14, 16)), ("mixture", (0, 5, 8, 11, 16))])
def test_a_path_is_of_noise_levels_not_of_coordinates(name: str, path: tuple[int, ...]):
    """Flow and EDM at the same sigma / alpha."""
    levels = [0.98 * (1 - i / 16) for i in range(16)]
    edm = EDM(sigma_max=levels[0] / (1 - levels[0]), sigma_min=1e-9, rho=1.0)
    sigmas = [t / (1 - t) for t in levels]
    matched = [float(edm.level(torch.tensor(v, dtype=torch.float64))) for v in sigmas]
    for process, at in ((Flow(), levels), (edm, matched)):
        net = gaussian(process, M, S) if name == "gaussian" else Mixture(process, *MIXTURE)
        grid = Grid(net, quantiles(200), None, at)
        if process is not edm:
            grid.start = grid.start * 0.98  # the prior of a flow is pure noise; the same point in both
        assert nearest(grid, grid.trajectory()[0], 4) == path


def test_the_programme_over_single_jumps_is_exact():
    grid = grid_of("mixture", 12)
    costs = jumps(grid, *grid.trajectory())
    for calls in (2, 3, 5):
        paths = ((0, *inner, 12) for inner in combinations(range(1, 12), calls - 1))
        want = min(paths, key=lambda p: sum(costs[a, b] for a, b in pairwise(p)))
        assert cheapest(costs, calls) == want
