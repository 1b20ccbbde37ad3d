"""What differs between two recipes, and between a recipe and the published settings of its method."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from fewstep.config import UserError, plain
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import read, shipped
from fewstep.recipe.store import load

PAPER = "paper/"
"""Shipped recipes with published settings stand under this name."""
_NOTATION = re.compile(
    r"method(\.\w+)*\.times: \{'name': '(\w+)'.*-> \{'name': '(?!\2')"
    r"|method\.critic\.weight: '(?!psi)\w+' -> '(?!psi)\w+'$"
)
"""Lines of a distribution of times, or a weight, of another kind: `lognormal` speaks of sigma, `index` of a table. Phased
DMD's weight psi is of another loss, whatever the process."""
SETTINGS = ("method", "before", "copy", "optim", "student", "critic", "discriminator", "roles")
"""The top keys that say what is trained and how."""
_TRAIN = ("steps", "batch", "clip", "precision", "ema", "product")


def diff(a: str, b: str | None, paper: bool, settings: Sequence[str] = ()) -> str:
    """`fewstep recipes diff`: one line `key: a -> b` for every setting that differs, defaults filled in.

    With `paper`, b is the shipped recipe of published settings that is nearest (`published`); its data, teacher
    and evaluation are not compared. Raises UserError when there is none of its kind.
    """
    left = load(a, settings)
    if not paper:
        if b is None:
            raise UserError(f"recipes diff {a}: name a second recipe, or add --paper")
        found = differences(left, load(b), all_keys=True)
        return "\n".join(found) if found else f"{a} and {b} are the same"
    if a.startswith(PAPER):
        raise UserError(f"recipes diff {a}: these are published settings; name a second recipe in place of --paper")
    if b is not None:
        raise UserError(f"recipes diff {a} {b}: --paper chooses the second recipe itself; leave one out")
    name, others = published(left, a)
    found = _compared(left, load(name))
    notation = [line for line in found if _NOTATION.match(line)]
    lines = [f"{a} -> {name} ({load(name).about})", *(line for line in found if line not in notation)]
    if notation:
        lines += ["in the notation of another process or prediction, so not one to one:", *notation]
    if others:
        lines.append(f"others of its kind: {', '.join(others)}")
    return "\n".join(lines)


def published(recipe: Recipe, name: str) -> tuple[str, list[str]]:
    """The recipe of published settings that is nearest, by number of steps first, and the others of its kind.

    A method is of several kinds where it covers several papers (consistency: cd, ct, ict, ect, lcm; `kind` where numbers
    tell them apart), and a joint one of its parts' methods; settings of another kind are no yardstick. Raises UserError
    when there is none of this kind.
    """
    method = _method(recipe)
    names = [n for n in shipped() if n.startswith(PAPER) and n != name]
    same = [n for n in names if _method(load(n)) == method]
    found = [n for n in same if kinds(load(n)) & kinds(recipe)]
    if not found:
        have = [f"{n} ({_told(load(n))})" for n in same] or sorted({_method(load(n)) for n in names})
        raise UserError(f"no published settings of {_told(recipe)} are shipped; there are {', '.join(have)}")
    steps = len(recipe.sampler().steps)
    found.sort(key=lambda n: (len(load(n).sampler().steps) != steps, len(_compared(recipe, load(n))), n))
    return found[0], found[1:]


def kinds(recipe: Recipe) -> frozenset[str]:
    """What a recipe is an instance of: the toy recipes that its method resembles most, or its parts' methods."""
    method: Any = recipe.method
    if method.name == "joint":
        return frozenset({" + ".join(share.method.name for share in method.methods)})
    if own := getattr(method, "kind", ""):
        return frozenset({own})
    near = {name: _distance(own, _choices(method)) for name, own in _toys(method.name).items()}
    return frozenset(n for n, d in near.items() if d == min(near.values())) or frozenset({method.name})


@lru_cache
def _toys(method: str) -> dict[str, dict[str, str | None]]:
    named = [n for n in shipped() if n.startswith("toy/") and read(n).data["method"]["name"] == method]
    return {n.removeprefix("toy/"): _choices(load(n).method) for n in named}


def _choices(method: Any) -> dict[str, str | None]:
    """What a method chooses rather than measures, by path: words, switches, parts, and options that are not set."""
    out: dict[str, str | None] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}")
        elif isinstance(value, (str, bool)) or value is None:
            out[path] = None if value is None else str(value)

    walk(plain(method), "")
    return out


def _distance(a: dict[str, str | None], b: dict[str, str | None]) -> tuple[int, int]:
    """(words that differ, options that only one of two methods sets)."""
    differing = [(a.get(k), b.get(k)) for k in {*a, *b} if a.get(k) != b.get(k)]
    words = sum(None not in pair for pair in differing)
    return words, len(differing) - words


def _told(recipe: Recipe) -> str:
    return " or ".join(sorted(kinds(recipe)))


def _compared(a: Recipe, b: Recipe) -> list[str]:
    out = []
    for line in differences(_spelled(a), _spelled(b), all_keys=True):
        top, _, rest = line.partition(":")[0].partition(".")
        if top in SETTINGS or (top == "train" and rest in _TRAIN):
            out.append(line)
    return out


def _spelled(recipe: Recipe) -> Recipe:
    """The recipe with an optimiser entry for every role that its stages train, in place of `default`."""
    trained = set().union(*(stage.method.needs().trained for stage in recipe.stages()))
    return replace(recipe, optim={role: recipe.optimizer(role) for role in sorted(trained)})


def _method(recipe: Recipe) -> str:
    return recipe.method.name


# Keys that may change between the start of a run and its continuation.
_FREE = {("about",), ("results",), ("evaluate",), ("success",), ("expected",)} | {
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
        "guard",
        "readings_every",
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
    """Leaves that differ; a part is one where its name differs, for its keys then mean other things."""
    if isinstance(a, dict) and isinstance(b, dict) and a.get("name") == b.get("name"):
        for key in sorted({*a, *b}):
            yield from _walk(a.get(key), b.get(key), (*path, key))
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b) and _of_parts(a):
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _walk(left, right, (*path, str(i)))
    elif a != b:
        yield path, a, b


def _of_parts(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(v, dict) for v in values)
