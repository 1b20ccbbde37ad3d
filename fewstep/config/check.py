"""Parsed YAML against the parts: built, or every problem at once with file and line.

Pydantic does the checking; a line map taken from the YAML nodes turns its error locations into file:line. A mapping
without `name` changes the default of its field key by key: `critic: {steps: 2}` leaves a method's other critic settings
as the method has them. With `name` it is a new part, with that part's own defaults.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from fewstep.config.parts import REGISTRY, OneOf, RecipeError, _close, plain
from fewstep.config.source import Path_, Source, path_of


def _hint(part: Any, key: str) -> Any:
    """The type of a part's field as pydantic resolved it; None for a key that is no field."""
    field = part.__pydantic_fields__.get(key)
    if field is None:
        return None
    return next((m for m in field.metadata if isinstance(m, OneOf)), field.annotation)


@cache
def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, at any depth; other types are their own only member."""
    if isinstance(hint, OneOf):
        return tuple(REGISTRY[hint.kind].values())
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        return _options(next((m for m in marks if isinstance(m, OneOf)), inner))
    if get_origin(hint) in (Union, UnionType):
        return tuple(option for arg in get_args(hint) for option in _options(arg))
    return (hint,)


@cache
def _parts(hint: Any) -> tuple[Any, ...]:
    return tuple(option for option in _options(hint) if dataclasses.is_dataclass(option))


def _part_of(hint: Any, data: Any, default: Any = None) -> Any:
    """The dataclass of type `hint` that a mapping describes: by its name, else the default's, else the only one."""
    parts = _parts(hint)
    if isinstance(data, dict) and "name" in data and isinstance(data["name"], str):
        return next((p for p in parts if getattr(p, "name", None) == data["name"]), None)
    if type(default) in parts:
        return type(default)
    return parts[0] if len(parts) == 1 else None


def _inner(hint: Any, data: Any, key: str | int) -> Any:
    """The type of data[key] for data of type `hint`; None where it cannot be told."""
    if part := _part_of(hint, data):
        return _hint(part, str(key))
    kinds = (dict,) if isinstance(data, dict) else (tuple, list)
    found = [get_args(o) for o in _options(hint) if get_origin(o) in kinds]
    return found[0][1 if isinstance(data, dict) else 0] if found else None


def _with_defaults(hint: Any, data: Any, default: Any = None) -> Any:
    """`data` of type `hint`, where a mapping without `name` has the keys that it leaves out from its default."""
    if isinstance(data, list):
        return [_with_defaults(_inner(hint, data, i), v) for i, v in enumerate(data)]
    if not isinstance(data, dict):
        return data
    part = _part_of(hint, data, default)
    defaults = {f.name: f.default for f in dataclasses.fields(part)} if part else {}
    if part and type(default) is part and "name" not in data:
        defaults = {name: getattr(default, name) for name in defaults}
        data = {**plain(default), **data}
    return {
        k: _with_defaults(_inner(hint, data, k), v, defaults.get(k)) if isinstance(v, (dict, list)) else v
        for k, v in data.items()
    }


def _fields_at(root: type, data: Any, path: Path_) -> tuple[list[str], list[str]]:
    """Keys allowed beside the last element of `path` in complete data; keys inside those, such as critic.steps."""
    hint: Any = root
    for key in path[:-1]:
        hint, data = _inner(hint, data, key), data[key]
    part = _part_of(hint, data)
    names = _names(part)
    return names, [f"{n}.{m}" for n in names for m in _names(_part_of(_hint(part, n), None))]


def _names(part: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(part)] if part else []


_known = [0]


def _forget() -> None:
    """Drop what was remembered of unions before another part was registered."""
    count = sum(map(len, REGISTRY.values()))
    if count != _known[0]:
        _options.cache_clear()
        _parts.cache_clear()
        _known[0] = count


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")
_EXPECTED = {
    "int_type": "int",
    "int_from_float": "int",
    "float_type": "float",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "list_type": "a list",
}


def _problem(error: Mapping[str, Any], root: type, source: Source, whole: Any) -> str:
    path: Path_ = ()
    here: Any = source.data
    for key in error["loc"]:
        inside = (isinstance(here, dict) and key in here) or (
            isinstance(here, list) and isinstance(key, int) and key < len(here)
        )
        if inside:
            path, here = (*path, key), here[key]
        elif error["type"] in (*_MISSING, *_UNKNOWN) and key == error["loc"][-1]:
            path = (*path, key)
    dotted = ".".join(map(str, path)) or "recipe"
    where, kind, ctx = source.where(path), error["type"], error.get("ctx", {})
    if kind in _UNKNOWN:
        allowed, deeper = _fields_at(root, whole, path)
        hint = _close(str(path[-1]), [*allowed, *deeper]) or (f"; allowed: {', '.join(allowed)}" if allowed else "")
        return f"{where}: {dotted}: unknown key{hint}"
    if kind in _MISSING:
        return f"{where}: {dotted}: required key is missing"
    if kind in ("union_tag_invalid", "literal_error"):
        allowed = re.findall(r"'([^']*)'", str(ctx.get("expected_tags") or ctx.get("expected")))
        given = str(ctx.get("tag", error["input"]))
        name = f"{dotted}.name" if kind == "union_tag_invalid" else dotted
        where = source.where((*path, "name")) if kind == "union_tag_invalid" else where
        return f"{where}: {name}: {given!r} is not one of {', '.join(allowed)}{_close(given, allowed)}"
    if kind == "union_tag_not_found":
        return f"{where}: {dotted}.name: required key is missing"
    if kind in _EXPECTED:
        return f"{where}: {dotted}: expected {_EXPECTED[kind]}, got {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if kind == "value_error" and isinstance(here, dict):
        # A check over several keys blames the part; the key that it names, or the first that it speaks of, is nearer.
        lead = re.match(r"[\w.]+(?=: )", message)
        keys = path_of(lead[0]) if lead else ()
        if not keys or keys[0] not in here:
            keys = tuple(w for w in re.findall(r"\w+", message) if w in here)[:1]
        if keys:
            dotted, where = ".".join(map(str, (*path, *keys))), source.where((*path, *keys))
            message = message.removeprefix(f"{'.'.join(map(str, keys))}: ")
    return f"{where}: {dotted}: {message}" + ("" if kind == "value_error" else f", got {error['input']!r}")


def validate(root: type, source: Source) -> Any:
    """Build `root` from parsed YAML, or raise RecipeError with every problem, sorted by line."""
    problems = list(source.problems)
    built: Any = None
    _forget()
    whole = _with_defaults(root, source.data)
    try:
        # JSON mode is strict about types yet takes a list for a tuple, which is all YAML has.
        built = TypeAdapter(root).validate_json(json.dumps(whole))
    except ValidationError as errors:
        problems += [_problem(e, root, source, whole) for e in errors.errors(include_url=False)]
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{source.where(())}: {error}") from None
    if problems:
        unique = sorted(dict.fromkeys(problems), key=lambda p: [int(n) for n in re.findall(r":(\d+):", p)[:1]] or [0])
        raise RecipeError("\n".join(unique))
    return built
