"""Parts: frozen pydantic dataclasses registered under (kind, name), which YAML chooses by their short name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, Field, GetCoreSchemaHandler
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import CoreSchema

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
REGISTRY: dict[str, dict[str, type]] = {}
T = TypeVar("T", bound=type)
Count = Annotated[int, Gt(0), Le(65_536)]
"""A width, a depth, a number of anything that takes memory: a slip of a few digits is refused before it takes any."""


Positive = Annotated[float, Gt(0), Le(1e9)]
"""A deviation, a noise level, a shift: nothing trains at 0, below it, or far beyond what noise in float32 covers."""
NotNegative = Annotated[float, Ge(0), Le(1e9)]
Proper = Annotated[float, Gt(0), Lt(1)]
"""A fraction that is neither nothing nor all."""
Bounded = Annotated[float, Ge(-1e9), Le(1e9)]
"""A mean or a logarithm."""
Decay = Annotated[float, Ge(0), Le(1)]
"""Of an average: 0 follows at once, 1 never."""


class RecipeError(ValueError):
    """A recipe, an override or a path that cannot be used; the message lists every problem, one a line."""


class UserError(RuntimeError):
    """Anything else a user can mend: the message says what was wrong and what is allowed. Exit code 2."""


class Absent(UserError):
    """Something that a recipe names and that is not here, or that only running its code would tell: no mistake in it."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: T) -> T:
    """Make a class a frozen, strict dataclass whose field docstrings are its documentation."""
    return pydantic_dataclass(frozen=True, kw_only=True, config=STRICT)(cls)  # type: ignore[return-value]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def part(kind: str, name: str) -> Callable[[T], T]:
    """Register a class as the choice `name` of a kind (method, times, network, data, ...)."""

    def register(cls: T) -> T:
        taken = REGISTRY.setdefault(kind, {})
        if name in taken:
            raise ValueError(f"{kind} {name!r} is registered twice: {taken[name].__module__}, {cls.__module__}")
        cls.__annotations__ = {"name": Literal[name], **cls.__annotations__}
        cls.name = name  # type: ignore[attr-defined]
        taken[name] = config(cls)
        return taken[name]  # type: ignore[return-value]

    return register


class OneOf:
    """Marks a field's type: any part that is registered under `kind` by then, selected by its `name` key.

    `TimesPart = Annotated[TimeDist, OneOf("times")]` is a `TimeDist` to a type checker and to whoever reads.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        members = tuple(REGISTRY[self.kind].values())
        if len(members) == 1:
            return handler.generate_schema(members[0])
        return handler.generate_schema(Annotated[Union[members], Field(discriminator="name")])  # noqa: UP007


def plain(value: Any) -> Any:
    """A config object as plain YAML-able data, defaults included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def _close(word: str, words: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
