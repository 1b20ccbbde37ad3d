"""`fewstep.load`: a recipe with Python values on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.networks import code
from fewstep.recipe import store
from fewstep.recipe.schema import Recipe


def load(name: str | Path, settings: Sequence[str] | Mapping[str, Any] = (), /, **keys: Any) -> Recipe:
    """A checked recipe: a shipped one by name or a YAML file, with settings on top.

    Args:
        name: such as "digits-dmd2" (`fewstep recipes ls`), or a path to a .yaml file.
        settings: values by dotted keys, {"train.steps": 3}, or the command line's ["train.steps=3"].
        keys: values by the recipe's own keys, train={"steps": 3}; they come last.

    A mapping changes key by key what stands there; with a `name` of its own it is a new part, and an empty one leaves
    nothing there but defaults. Code that
    a setting names (wrapper, factory) may run from then on: naming it is asking for it.

    Raises:
        RecipeError: every problem at once, with the file and line or the argument that it comes from.

    >>> recipe = fewstep.load("toy/dmd2", {"train.batch": 64}, train={"steps": 3})
    >>> recipe.train.steps, recipe.train.batch, recipe.method.name
    (3, 64, 'dmd2')
    >>> fewstep.load("toy/dmd2", ["train.batch=64"], train={"steps": 3}) == recipe
    True
    >>> fewstep.load("toy/dmd2", train={"stpes": 3})
    Traceback (most recent call last):
    fewstep.config.parts.RecipeError: argument 'train': train.stpes: unknown key; did you mean 'steps'?
    """
    if not isinstance(name, str | Path):
        raise TypeError(f"name: expected a recipe's name or path, not a {type(name).__name__}")
    if isinstance(settings, str):
        raise TypeError(f"settings: expected a mapping or a list of key=value, not the text {settings!r}")
    dotted = settings if isinstance(settings, Mapping) else {}
    typed = () if isinstance(settings, Mapping) else tuple(settings)
    recipe = store.load(str(name), typed, dotted, keys)
    given = [*dotted, *keys, *(s.partition("=")[0] for s in typed)]
    if any(name == key or name.startswith(f"{key}.") for name in code.named(recipe) for key in given):
        code.allow(recipe)
    return recipe
