"""Samplers fitted to a teacher in memory: calibration noises, what they cost, and the samplers they are beside."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.algebra.condition import moved, rows
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.fitted import fit_history, multistep, nodes
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.sampling import Sampler, sample
from fewstep.algebra.searched import search_levels
from fewstep.train.product import Product

VALUES = 1 << 20
"""Most numbers of the states that go through a network at once."""
SUBSTEPS = 10
"""Of the fine trajectory that a history is fitted to, per step (D-ODE's released setting)."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is fitted: numbers of calls, nodes searched, calibration noises and their seed."""

    calls: tuple[int, ...]
    solver: Literal["ddim", "2m"] = "ddim"
    points: int = 32
    noises: int = 60
    seed: int = 7
    history: bool = True


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The samplers, in the order of the wish, and what finding them took: network calls of one sample, seconds."""

    samplers: tuple[Sampler, ...]
    calls: int
    seconds: float


class Counted:
    """A denoiser called in parts that fit into memory; `calls` are of single samples, guidance not counted."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.process, self.calls = net, net.process, 0

    def __call__(self, x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        self.calls += len(x)
        part = max(1, VALUES // x[0].numel())
        cut = [slice(i, i + part) for i in range(0, len(x), part)]
        x0 = torch.cat([self.net(x[c], t[c], rows(cond, c)).x0 for c in cut])
        return from_x0(self.process, x, t, x0)  # type: ignore[arg-type]


def noise_of(product: Product, seed: int, name: str, count: int) -> tuple[Tensor, Any]:
    """(start noise (count, *d), conditions of training samples); no seed of a measurement ever draws this noise."""
    device = product.device()
    noise = Draws(fold(seed, "fit", name), torch.arange(count, device=device)).normal(*product.shape)
    cond = product.calibrating(Draws(fold(seed, "fit", name, "conditions"), torch.arange(count)))
    return noise, moved(cond, device)


def fit(product: Product, wish: Wish) -> Fit:
    """Samplers of a teacher whose guidance is inside its net, for every number of calls.

    Raises:
        ValueError: calls or points that the process has not.
    """
    started, net = time.process_time(), Counted(product.net)
    noise, cond = noise_of(product, wish.seed, "calibration", wish.noises)
    process: Any = product.net.process
    grid = nodes(process, wish.points)
    found = []
    for calls in wish.calls:
        path = search_levels(net, noise, cond, calls, grid)
        levels = tuple(grid[i] for i in path[:-1])
        history: tuple[float, ...] = ()
        if wish.solver == "2m":
            history = multistep(process, levels)
        elif wish.history:
            history = fit_history(net, noise, cond, levels, SUBSTEPS)
        found.append(Sampler(kind="map", steps=levels, history=history))
    return Fit(samplers=tuple(found), calls=net.calls, seconds=time.process_time() - started)


def expected_calls(wish: Wish) -> int:
    """Network calls that `fit` will about take: the search K N, polishing a few rounds, the history 11 a step."""
    n = wish.points
    return wish.noises * sum(n + k * n + 4 * k * k + (SUBSTEPS + 1) * k * wish.history for k in wish.calls)


def beside(product: Product, fitted: Sampler) -> list[tuple[str, Sampler]]:
    """(name, sampler) of as many calls: even DDIM and DPM++2M, searched levels alone, and the fitted one."""
    process: Any = product.net.process
    calls = len(fitted.steps)
    even = nodes(process, calls)
    bare = replace(fitted, history=())
    two = Sampler(kind="map", steps=even, history=multistep(process, even))
    named = [("even DDIM", replace(bare, steps=even)), ("even DPM++2M", two), ("searched levels", bare)]
    if not fitted.history:
        return named
    name = "2M on them" if fitted.history == multistep(process, fitted.steps) else "fitted history"
    return [*named, (name, fitted)]


@torch.no_grad()
def distances(product: Product, samplers: Sequence[Sampler], seed: int, count: int, points: int) -> list[Tensor]:
    """Root mean squared difference (count,) of each sampler's samples from the fine trajectory of the same noise.

    Fine is DDIM through twice the points, on noises that nothing was fitted to.
    """
    net = Counted(product.net)
    noise, cond = noise_of(product, seed, "held out", count)
    process: Any = product.net.process
    most = getattr(process, "steps", 2 * points)
    fine = sample(Sampler(kind="map", steps=nodes(process, min(2 * points, most))), net, noise, cond)
    drawn = (sample(s, net, noise, cond) for s in samplers)
    return [(x - fine).double().flatten(1).square().mean(1).sqrt() for x in drawn]
