"""The frozen teacher under a fitted sampler, as a row beside students of as many calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from fewstep.algebra.bridge import Bridge
from fewstep.commands.fitting import Fit, Wish, expected_calls, fit
from fewstep.networks.declared import declared_process
from fewstep.recipe.schema import Evaluate, Recipe
from fewstep.train.product import Product

SHARE = 0.05
"""Of a run's network calls, up to which fitting is done unasked."""
NOISES = 10
"""Of a fit that nobody asked for by itself; on digits as good as sixty (docs/fitting.md)."""
POINTS = 32
METHOD = "fitted"
"""What stands in place of a method's name."""


def calls_of(recipe: Recipe) -> int:
    """At least so many network calls of one sample does a training take: forward and backward of what it trains."""
    batch = recipe.train.batch
    return sum(3 * batch * stage.steps * len(stage.method.needs().trained) for stage in recipe.stages())


def wish_for(spec: Evaluate, teacher: Any, counts: Iterable[int], spent: float) -> Wish | None:
    """What is fitted for students of these numbers of calls by a training of `spent` network calls; None for nothing.

    teacher: its spec. One call leaves nothing to fit, a bridge no step of DDIM from its source; an analytic teacher is
    fitted only where that is asked for.
    """
    calls = tuple(sorted({n for n in counts if 2 <= n <= POINTS}))
    if teacher is None or not calls or spec.fitted is False:
        return None
    if isinstance(declared_process(teacher, "teacher", {})[0], Bridge):
        return None
    wish = Wish(calls=calls, points=POINTS, noises=NOISES)
    if spec.fitted:
        return wish
    return wish if teacher.name != "ring" and expected_calls(wish) < SHARE * spent else None


def fitted_teacher(student: Product, teacher: Any, wish: Wish) -> tuple[list[Product], Fit]:
    """The teacher, guided as it is measured, under a sampler for each number of calls, on the student's data."""
    bare = replace(student, net=teacher, title="teacher fitted", trained=None, recipe=student.recipe)
    done = fit(bare, wish)
    return [replace(bare, sampler=s, title=f"teacher fitted, {len(s.steps)} calls") for s in done.samplers], done
