"""Levels for a few DDIM steps, searched on a frozen denoiser: the path of nodes whose end is nearest the fine one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.algebra.fitted import Net, asked, transfer
from fewstep.algebra.jump import times_of
from fewstep.algebra.process import Process

Path = tuple[int, ...]


def even_path(calls: int, points: int) -> Path:
    """Nodes of `calls` even steps over `points` nodes, the clean end last."""
    return tuple(round(i * points / calls) for i in range(calls + 1))


class Grid:
    """A denoiser's DDIM between nodes: its fine trajectory, and the end of any coarser path.

    Args:
        net: denoiser with a `process`; guidance, where wanted, is inside.
        noise: standard normal (b, *d); states are kept in float64 whatever its dtype, which the net sees.
        cond: conditions of these rows, or None.
        levels: nodes u, decreasing from the prior; index len(levels) is the clean end, where a state is the last x0.
    """

    def __init__(self, net: Net, noise: Tensor, cond: Any, levels: Sequence[float]) -> None:
        self.process: Process = net.process  # type: ignore[attr-defined]
        self._x0 = asked(net, cond, noise.dtype)
        self.times = [*times_of(levels, self.process).to(noise.device), None]
        self.end = len(levels)
        first = self.times[0]
        assert first is not None
        self.start = self.process.prior(noise.double(), first.expand(len(noise)))

    def ask(self, x: Tensor, i: int) -> Tensor:
        """x0 (b, *d) at node i: one network call."""
        return self._x0(x, self.times[i])

    def move(self, x: Tensor, x0: Tensor, i: int, j: int) -> Tensor:
        """The DDIM transfer of x from node i to node j with this x0."""
        return transfer(self.process, x, x0, self.times[i], self.times[j])

    def trajectory(self) -> tuple[list[Tensor], list[Tensor]]:
        """States at every node, the clean end included, and the x0 at each node before it."""
        states, answers = [self.start], []
        for i in range(self.end):
            answers.append(self.ask(states[-1], i))
            states.append(self.move(states[-1], answers[-1], i, i + 1))
        return states, answers

    def replay(self, path: Sequence[int], x: Tensor | None = None) -> Tensor:
        """The end of DDIM along a path of nodes, from x (b, *d) at the first or from the prior."""
        x = self.start if x is None else x
        for i, j in pairwise(path):
            x = self.move(x, self.ask(x, i), i, j)
        return x


def gap(a: Tensor, b: Tensor) -> float:
    """Mean squared difference."""
    return float((a - b).square().mean())


@torch.no_grad()
def search_levels(
    net: Net,
    noise: Tensor,
    cond: Any,
    calls: int,
    levels: Sequence[float],
    cost: Literal["path", "jump"] = "path",
) -> Path:
    """The nodes of `calls` DDIM steps that end nearest the end of DDIM through all nodes.

    path: optimal stepsizes (arXiv 2503.21774). A dynamic programme keeps, per node and number of steps, the state
    nearest the fine trajectory. Nothing makes that optimal, even levels may be better; so its path is `polished`, the
    even one beside it where that ends nearer, and the better is returned. About K N calls of the batch for K steps over
    N nodes. jump: GITS (arXiv 2405.11326) adds up errors of single jumps from the fine trajectory itself, in N calls and
    with an exact programme, here without its factor 1.15 a step; it does not see how errors travel.

    Returns:
        (0, ..., len(levels)), len calls + 1.

    Raises:
        ValueError: calls outside 1..len(levels).
    """
    grid = Grid(net, noise, cond, levels)
    if not 1 <= calls <= grid.end:
        raise ValueError(f"calls must lie in 1..{grid.end}, the number of points, not {calls}")
    states, answers = grid.trajectory()
    if cost == "jump":
        return cheapest(jumps(grid, states, answers), calls)
    found, even = nearest(grid, states, calls), even_path(calls, grid.end)
    errors = [gap(grid.replay(path), states[-1]) for path in (found, even)]
    paths = [found, even] if errors[1] <= errors[0] else [found]
    return min((polished(grid, path, states[-1]) for path in paths), key=lambda f: f[1])[0]


def nearest(grid: Grid, states: Sequence[Tensor], calls: int) -> Path:
    """The path of the dynamic programme of arXiv 2503.21774, alg. 1, with exactly `calls` steps from node 0."""
    here = {0: grid.start}
    back: list[dict[int, int]] = []
    for k in range(1, calls + 1):
        least: dict[int, tuple[float, Tensor, int]] = {}
        for i, x in here.items():
            x0 = grid.ask(x, i)
            # Nodes are left for the steps that follow, one each; the last step goes to the end.
            for j in range(i + 1, grid.end + k - calls + 1) if k < calls else (grid.end,):
                y = grid.move(x, x0, i, j)
                error = gap(y, states[j])
                if j not in least or error < least[j][0]:
                    least[j] = (error, y, i)
        here = {j: y for j, (_, y, _) in least.items()}
        back.append({j: i for j, (*_, i) in least.items()})
    return traced(back, grid.end)


def traced(back: Sequence[dict[int, int]], end: int) -> Path:
    """The path that the predecessors of each step lead back from `end`."""
    path = [end]
    for step in reversed(back):
        path.append(step[path[-1]])
    return tuple(reversed(path))


def polished(grid: Grid, path: Sequence[int], target: Tensor) -> tuple[Path, float]:
    """(path, its mean squared error at the end) after inner nodes moved to neighbours as long as that helps.

    Moves to any free node, at twice the calls, ended at the same paths in 20 mixtures of 2 to 5 steps over 10 to 20
    nodes.
    """
    best, error, better = list(path), gap(grid.replay(path), target), True
    while better:
        better, x = False, grid.start
        for k in range(1, len(best) - 1):
            before, after = best[k - 1], best[k + 1]
            x0, tries = grid.ask(x, before), [(error, best[k])]
            for j in (best[k] - 1, best[k] + 1):
                if before < j < after:
                    tries.append((gap(grid.replay([j, *best[k + 1 :]], grid.move(x, x0, before, j)), target), j))
            least = min(tries)
            # Rounding alone must not send it back and forth.
            if least[0] < error * (1 - 1e-12):
                (error, best[k]), better = least, True
            x = grid.move(x, x0, before, best[k])
    return tuple(best), error


def jumps(grid: Grid, states: Sequence[Tensor], answers: Sequence[Tensor]) -> Mapping[tuple[int, int], float]:
    """Root mean squared error of every single jump i -> j from the fine trajectory."""
    return {
        (i, j): math.sqrt(gap(grid.move(states[i], answers[i], i, j), states[j]))
        for i in range(grid.end)
        for j in range(i + 1, grid.end + 1)
    }


def cheapest(costs: Mapping[tuple[int, int], float], calls: int) -> Path:
    """The path of `calls` jumps from node 0 to the last with the least sum of costs."""
    end, total = max(j for _, j in costs), {0: 0.0}
    back: list[dict[int, int]] = []
    for _ in range(calls):
        least: dict[int, tuple[float, int]] = {}
        for (i, j), cost in costs.items():
            if i in total and (j not in least or total[i] + cost < least[j][0]):
                least[j] = (total[i] + cost, i)
        total = {j: c for j, (c, _) in least.items()}
        back.append({j: i for j, (_, i) in least.items()})
    return traced(back, end)
