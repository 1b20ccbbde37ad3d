"""Recipes as checked data: registered parts, YAML with line numbers, and all problems of a file at once.

A part is a frozen pydantic dataclass registered under (kind, name); YAML chooses it by its short name. Pydantic does the
checking; a line map taken from the YAML nodes turns its error locations into file:line. A mapping without `name` changes
the default of its field key by key: `critic: {steps: 2}` leaves a method's other critic settings as the method has them.
With `name` it is a new part, with that part's own defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

import yaml
from pydantic import ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import CoreSchema

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
REGISTRY: dict[str, dict[str, type]] = {}
T = TypeVar("T", bound=type)


class RecipeError(ValueError):
    """A recipe, an override or a path that cannot be used; the message lists every problem, one a line."""


class UserError(RuntimeError):
    """Anything else a user can mend: the message says what was wrong and what is allowed. Exit code 2."""


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


FAST_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""YAML's safe loader, by libyaml where PyYAML was built with it."""
_RULES = {
    "int": (r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    "float": (
        r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)$",
        "-+.0123456789",
    ),
    "bool": (r"^(?:true|false|True|False)$", "tTfF"),
    "timestamp": (None, ""),
}


def recipe_loader(base: Any) -> Any:
    """`base` in which 1e-4 is a number (YAML 1.1 asks for a dot) and yes/no/on/off, dates and 1:30 stay text."""
    tag = "tag:yaml.org,2002:{}".format
    redefined = {tag(kind) for kind in _RULES}
    kept = {
        first: [(name, rx) for name, rx in rules if name not in redefined]
        for first, rules in base.yaml_implicit_resolvers.items()
    }
    loader = type("RecipeLoader", (base,), {"yaml_implicit_resolvers": kept})
    for kind, (pattern, first) in _RULES.items():
        if pattern is not None:
            loader.add_implicit_resolver(tag(kind), re.compile(pattern), list(first))  # type: ignore[attr-defined]
    return loader


LOADER = recipe_loader(FAST_LOADER)
PLAIN_LOADER = recipe_loader(yaml.SafeLoader)

Path_ = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """Parsed YAML and where each key stood: lines[("method", "critic", "steps")] == (file, line)."""

    data: dict[str, Any]
    lines: dict[Path_, tuple[str, int]]
    problems: tuple[str, ...] = ()

    def where(self, path: Path_) -> str:
        """file:line of the deepest part of a path that stands in the file."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                name, line = self.lines[path[:end]]
                return f"{name}:{line}" if line else name
        return "recipe"


def parse(text: str, name: str) -> Source:
    """Read YAML text; syntax errors and repeated keys raise or are collected with their line."""

    try:
        return _parsed(text, name, LOADER)
    except yaml.YAMLError:
        pass
    try:
        return _parsed(text, name, PLAIN_LOADER)  # its complaints say more than libyaml's
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        reason = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise RecipeError(f"{name}:{line}: not valid YAML: {reason}") from None


def _parsed(text: str, name: str, kind: Any) -> Source:
    loader = kind(text)
    root = loader.get_single_node()
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{name}:1: a recipe is a mapping of keys to values")
    lines: dict[Path_, tuple[str, int]] = {(): (name, 1)}
    problems: list[str] = []

    def walk(node: yaml.Node, path: Path_) -> Any:
        if isinstance(node, yaml.MappingNode):
            out: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(loader.construct_object(key_node))
                at = (*path, key)
                line = key_node.start_mark.line + 1
                if key in out:
                    problems.append(
                        f"{name}:{line}: {'.'.join(map(str, at))}: key stands twice (first in line {lines[at][1]})"
                    )
                lines[at] = (name, line)
                out[key] = walk(value_node, at)
            return out
        if isinstance(node, yaml.SequenceNode):
            items = []
            for i, item in enumerate(node.value):
                lines[(*path, i)] = (name, item.start_mark.line + 1)
                items.append(walk(item, (*path, i)))
            return items
        return loader.construct_object(node)

    return Source(walk(root, ()), lines, tuple(problems))


def merge(base: Source, over: Source) -> Source:
    """`over` on top of `base`: mappings merge key by key, unless `name` changes: then the part is new."""

    def join(a: Any, b: Any) -> Any:
        if not (isinstance(a, dict) and isinstance(b, dict)):
            return b
        if "name" in a and "name" in b and a["name"] != b["name"]:
            return b
        return {**a, **{k: join(a[k], v) if k in a else v for k, v in b.items()}}

    return Source(join(base.data, over.data), {**base.lines, **over.lines}, (*base.problems, *over.problems))


def override(source: Source, settings: Sequence[str]) -> Source:
    """Apply `key.path=value` settings; values are YAML. Raises RecipeError naming the argument."""
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"argument {setting!r}: expected key=value, such as train.steps=200")
        try:
            parsed = parse(f"value: {value}", f"argument {setting!r}").data["value"]
        except RecipeError:
            raise RecipeError(f"argument {setting!r}: {value!r} is not a YAML value") from None
        path: Path_ = tuple(int(k) if k.isdigit() else k for k in key.split("."))
        data: Any = json.loads(json.dumps(source.data))
        here = data
        for depth, k in enumerate(path[:-1]):
            if isinstance(here, list) and isinstance(k, int) and k < len(here):
                here = here[k]
            elif isinstance(here, dict):
                if here.get(str(k)) is None:
                    here[str(k)] = {}
                here = here[str(k)]
            else:
                raise RecipeError(f"argument {setting!r}: {'.'.join(map(str, path[: depth + 1]))} has no keys")
        if isinstance(here, list):
            index = path[-1]
            if not isinstance(index, int) or index >= len(here):
                raise RecipeError(f"argument {setting!r}: the list has {len(here)} entries")
            here[index] = parsed
        elif isinstance(here, dict):
            here[str(path[-1])] = parsed
        else:
            raise RecipeError(f"argument {setting!r}: {key.rpartition('.')[0]} has no keys")
        lines = {p: w for p, w in source.lines.items() if p[: len(path)] != path}
        named = (f"argument {setting!r}", 0)
        fresh = {path[:n]: named for n in range(1, len(path)) if path[:n] not in lines}
        source = Source(data, {**lines, **fresh, path: named}, source.problems)
    return source


def _close(word: str, words: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


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
    if isinstance(data, dict) and "name" in data:
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
        keys = lead[0].split(".") if lead else []
        if not keys or keys[0] not in here:
            keys = [w for w in re.findall(r"\w+", message) if w in here][:1]
        if keys:
            dotted, where = ".".join(map(str, (*path, *keys))), source.where((*path, *keys))
            message = message.removeprefix(f"{'.'.join(keys)}: ")
    return f"{where}: {dotted}: {message}" + ("" if kind == "value_error" else f", got {error['input']!r}")


def validate(root: type, source: Source) -> Any:
    """Build `root` from parsed YAML, or raise RecipeError with every problem, sorted by line."""
    problems = list(source.problems)
    built: Any = None
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


def load_yaml(path: Path, shown: str | None = None) -> Source:
    """Read a YAML file; RecipeError names it when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{shown or path}: cannot be read: {error}") from None
    return parse(text, shown or str(path))


def plain(value: Any) -> Any:
    """A config object as plain YAML-able data, defaults included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value
