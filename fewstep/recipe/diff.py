"""What differs between two recipes, and between a recipe and the published settings of its method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import fewstep.data
import fewstep.methods
import fewstep.networks.perceptual
import fewstep.networks.routed
import fewstep.networks.specs  # noqa: F401  registers networks and teachers
from fewstep.config import (
    UserError,
    plain,
)
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load, shipped

PAPER = "paper/"
"""Shipped recipes with published settings stand under this name."""
_SETTINGS = ("method", "before", "copy", "optim", "student", "critic", "discriminator", "roles")
_TRAIN = ("steps", "batch", "clip", "precision", "ema", "product")


def diff(a: str, b: str | None, paper: bool, settings: Sequence[str] = ()) -> str:
    """`fewstep recipes diff`: one line `key: a -> b` for every setting that differs, defaults filled in.

    With `paper`, b is the shipped recipe of published settings that is nearest (`published`); its data, teacher
    and evaluation are not compared. Raises UserError when there is none.
    """
    left = load(a, settings)
    if not paper:
        if b is None:
            raise UserError(f"recipes diff {a}: name a second recipe, or add --paper")
        found = differences(left, load(b), all_keys=True)
        return "\n".join(found) if found else f"{a} and {b} are the same"
    if b is not None:
        raise UserError(f"recipes diff {a} {b}: --paper chooses the second recipe itself; leave one out")
    name, others = published(left, a)
    lines = [f"{a} -> {name} ({load(name).about})", *_compared(left, load(name))]
    if others:
        lines.append(f"others with the method {_method(left)}: {', '.join(others)}")
    return "\n".join(lines)


def published(recipe: Recipe, name: str) -> tuple[str, list[str]]:
    """The recipe of published settings that is nearest, by number of steps first, and the others of the method."""
    method = _method(recipe)
    names = [n for n in shipped() if n.startswith(PAPER) and n != name]
    found = [n for n in names if _method(load(n)) == method]
    if not found:
        have = sorted({_method(load(n)) for n in names})
        raise UserError(
            f"no published settings of the method {method} are shipped; there are {', '.join(have)}"
        )
    steps = len(recipe.sampler().steps)
    found.sort(key=lambda n: (len(load(n).sampler().steps) != steps, len(_compared(recipe, load(n))), n))
    return found[0], found[1:]


def _compared(a: Recipe, b: Recipe) -> list[str]:
    out = []
    for line in differences(_spelled(a), _spelled(b), all_keys=True):
        top, _, rest = line.partition(":")[0].partition(".")
        if top in _SETTINGS or (top == "train" and rest in _TRAIN):
            out.append(line)
    return out


def _spelled(recipe: Recipe) -> Recipe:
    """The recipe with an optimiser entry for every role that its stages train, in place of `default`."""
    trained = set().union(*(stage.method.needs().trained for stage in recipe.stages()))
    return replace(recipe, optim={role: recipe.optimizer(role) for role in sorted(trained)})


def _method(recipe: Recipe) -> str:
    return recipe.method.name  # type: ignore[attr-defined]


# Keys that may change between the start of a run and its continuation.
_FREE = {("about",), ("results",), ("evaluate",)} | {
    ("train", key)
    for key in (
        "steps",
        "log_every",
        "sample_every",
        "eval_every",
        "checkpoint_every",
        "keep",
        "trackers",
        "max_skips",
        "offload",
        "parallel",
    )
}


def differences(a: Recipe, b: Recipe, *, all_keys: bool = False) -> list[str]:
    """`key: a -> b` for every leaf that differs; only those that must not change in a resumed run by default."""
    out = []
    for path, left, right in _walk(plain(a), plain(b), ()):
        if all_keys or not any(path[: len(f)] == f for f in _FREE):
            out.append(f"{'.'.join(path)}: {left!r} -> {right!r}")
    return out


def _walk(a: Any, b: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _walk(a.get(key), b.get(key), (*path, key))
    elif a != b:
        yield path, a, b
