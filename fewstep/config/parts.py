"""Parts: frozen pydantic dataclasses registered under (kind, name), which YAML chooses by their short name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, Field, GetCoreSchemaHandler
from pydantic.dataclasses import dataclass as pydantic_dataclass, rebuild_dataclass
from pydantic_core import CoreSchema

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
REGISTRY: dict[str, dict[str, type]] = {}
_MADE: list[Any] = []
"""Every config class, those that a class is made of before it."""
_ASKED: set[str] = set()
"""Kinds that a class was made with: a part that is registered later is not in its schema."""
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
    """A recipe, an override or a path that cannot be used; the message lists every problem, one a line.

    >>> try:
    ...     fewstep.load("digits-teachr")
    ... except fewstep.RecipeError as error:
    ...     print(error)
    recipe 'digits-teachr' is not shipped; did you mean 'digits-teacher'?
    """


class UserError(RuntimeError):
    """Anything else a user can mend: the message says what was wrong and what is allowed. Exit code 2.

    >>> try:
    ...     fewstep.open_product("nowhere")
    ... except fewstep.UserError as error:
    ...     print(error)
    nowhere: no such run or folder
    """


class Absent(UserError):
    """Something that a recipe names and that is not here, or that only running its code would tell: no mistake in it."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: T) -> T:
    """Make a class a frozen, strict dataclass whose field docstrings are its documentation."""
    made = pydantic_dataclass(frozen=True, kw_only=True, config=STRICT)(cls)
    _MADE.append(made)
    return made  # type: ignore[return-value]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def part(kind: str, name: str) -> Callable[[T], T]:
    """Register a class as the choice `name` of a kind (method, times, network, data, ...).

    >>> @fewstep.part("times", "example_only")
    ... class Example:
    ...     "Always the middle level."
    ...
    ...     def sample(self, draws, process, span=(0.0, 1.0)):
    ...         return process.grid(torch.full((len(draws),), 0.5, dtype=torch.float64))
    >>> fewstep.load("toy/dmd2", {"method.times": {"name": "example_only"}}).method.times
    Example(name='example_only')
    """

    def register(cls: T) -> T:
        taken = REGISTRY.setdefault(kind, {})
        same = name in taken and _home(taken[name]) == _home(cls)  # a cell of a notebook that is run again
        if name in taken and not same:
            raise ValueError(f"{kind} {name!r} is registered twice: {taken[name].__module__}, {cls.__module__}")
        cls.__annotations__ = {"name": Literal[name], **cls.__annotations__}
        cls.name = name  # type: ignore[attr-defined]
        taken[name] = config(cls)
        if kind in _ASKED:
            _take_in(kind)
        return taken[name]  # type: ignore[return-value]

    return register


def _home(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _take_in(kind: str) -> None:
    """Make the classes anew that choose among parts of a kind, for one that was registered after them."""
    kinds, stale = {kind}, set()

    def chooses(hint: Any) -> bool:
        if isinstance(hint, OneOf):
            return hint.kind in kinds
        return hint in stale if isinstance(hint, type) else any(map(chooses, get_args(hint)))

    for cls in _MADE:
        fields = cls.__pydantic_fields__.values()
        if any(chooses(m) for f in fields for m in (f.annotation, *f.metadata)):
            rebuild_dataclass(cls, force=True)
            stale.add(cls)
            kinds |= {k for k, parts in REGISTRY.items() if cls in parts.values()}


class OneOf:
    """Marks a field's type: any part that is registered under `kind` by then, selected by its `name` key.

    `TimesPart = Annotated[TimeDist, OneOf("times")]` is a `TimeDist` to a type checker and to whoever reads.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        _ASKED.add(self.kind)
        members = tuple(REGISTRY[self.kind].values())
        if len(members) == 1:
            return handler.generate_schema(members[0])
        return handler.generate_schema(Annotated[Union[members], Field(discriminator="name")])  # noqa: UP007


def plain(value: Any) -> Any:
    """A config object as plain YAML-able data, defaults included."""
    return _data(value, whole=True)


def stated(value: Any) -> Any:
    """`plain` for digests, without keys that are null, false or empty by default and are so here.

    A later key that is off by default makes no other digest of what is without it; one whose default is a number or a
    part does.
    """
    return _data(value, whole=False)


def _data(value: Any, whole: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        known = {} if whole else getattr(type(value), "__pydantic_fields__", {})
        return {k: _data(v, whole) for k, v in held.items() if k not in known or not _off(v, known[k])}
    if isinstance(value, Mapping):
        return {k: _data(v, whole) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_data(v, whole) for v in value]
    return value


def _off(value: Any, field: Any) -> bool:
    empty = value is None or value is False or (isinstance(value, (str, tuple, list, Mapping)) and not value)
    if not empty or field.is_required():
        return False
    default = field.get_default(call_default_factory=True)
    return type(default) is type(value) and bool(default == value)


def _close(word: str, words: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
