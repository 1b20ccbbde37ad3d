"""Samples that go on from a given one, noised to a level and drawn from there (SDEdit, arXiv 2108.01073)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from fewstep.algebra.jump import times_of
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import Process
from fewstep.algebra.rollout import renoise
from fewstep.algebra.sampling import Fresh, Sampler, sample

NEAR = 1e-6
"""Levels that are nearer are one."""


def begun_at(sampler: Sampler, strength: float) -> Sampler:
    """The sampler that begins at the level `strength` in (0, 1] and goes on by its own levels below it.

    Its answer at a level between its own is as good as its training there: a student of a few levels has none, one of
    all knots (STD, LCM) has.

    Raises:
        ValueError: a strength that is none, or above the sampler's first level; a sampler with weights of its steps.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], not {strength:g}")
    if strength > sampler.steps[0] + NEAR:
        raise ValueError(f"strength {strength:g}: lies above the first level, {sampler.steps[0]:g}, of this sampler")
    if sampler.history:
        raise ValueError("strength: a sampler with a history of steps has weights for its own levels alone")
    below = tuple(u for u in sampler.steps if u < strength - NEAR)
    return replace(sampler, steps=(strength, *below), counts=None, lists=())


def onward(
    sampler: Sampler,
    net: Callable[..., Prediction],
    x: Tensor,
    noise: Tensor,
    cond: Any = None,
    fresh: Fresh | None = None,
    *,
    strength: float,
) -> Tensor:
    """Samples x0 (b, *d) that begin as x (b, *d) at the level `strength`, under `cond`; errors as `begun_at`.

    With an exact flow map of N(m, s^2) and one step the correlation with x is alpha s / sqrt(alpha^2 s^2 + sigma^2):
    towards 1 as the strength falls, and as it rises towards alpha = 0 none.
    """
    begun = begun_at(sampler, strength)
    process: Process = net.process  # type: ignore[attr-defined]
    t = times_of(begun.steps, process)[0].to(x.device).expand(len(x))
    start = renoise(process, x, begun.noise_scale * noise, t)
    return sample(begun, net, noise, cond, fresh, start=start)
