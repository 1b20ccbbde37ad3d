"""What a recipe says of a denoiser before it is built: its process and its further inputs, and by which key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fewstep.algebra.process import Process


def declared_process(spec: Any, key: str, specs: Mapping[str, Any]) -> tuple[Process | None, str]:
    """(process of the denoiser that `spec` builds, the key that sets it); None where only the teacher's files tell.

    Args:
        spec: a network's or teacher's spec that stands under `key`.
        specs: those of the recipe's roles by name, which copies and adapters refer to.
    """
    source, at, rest = _source(spec, key, specs)
    if source is not None:
        return declared_process(source, at, rest)
    return getattr(spec, "process", None), _key(spec, key, "process")


def declared_inputs(spec: Any, key: str, specs: Mapping[str, Any]) -> tuple[frozenset[str], str]:
    """(scalar inputs that the denoiser takes beside the time, the key that names them); arguments as above."""
    own = frozenset(getattr(spec, "inputs", ()))
    source, at, rest = _source(spec, key, specs)
    if source is None:
        return own, _key(spec, key, "inputs")
    inherited, above = declared_inputs(source, at, rest)
    return own | inherited, _key(spec, key, "inputs") if hasattr(spec, "inputs") else above


def _source(spec: Any, key: str, specs: Mapping[str, Any]) -> tuple[Any, str, Mapping[str, Any]]:
    """The spec that this one copies, adapts or repeats, with its key; None for one of its own."""
    of = getattr(spec, "of", None)
    if not isinstance(of, str):
        return of, f"{key}.of", specs
    # Without the role itself, so that a copy of a copy of itself ends; building it will say what is wrong.
    return specs.get(of), of, {name: s for name, s in specs.items() if name != of}


def _key(spec: Any, key: str, field: str) -> str:
    return f"{key}.{field}" if field in {f.name for f in dataclasses.fields(spec)} else key
