"""YAML with line numbers: parsed, merged with what it extends, changed by settings. Keys are not checked here."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fewstep.config.parts import RecipeError, plain

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


DEPTH, NODES, DIGITS = 40, 20_000, 40
"""Limits of a recipe: nesting, parser events, characters of a number."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character: how Python shows a byte of a command line that is no UTF-8, or what a YAML escape has cut."""
SMALLEST, LARGEST = 1.2e-38, 3.4e38
"""Of a number that float32 holds."""


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
    if lone := SURROGATE.search(text):
        raise RecipeError(f"{name}:{text.count(chr(10), 0, lone.start()) + 1}: holds a byte that is no UTF-8")
    try:
        return _parsed(text, name, LOADER)
    except yaml.YAMLError:
        pass
    except RecursionError:
        raise RecipeError(f"{name}:1: is nested too deep") from None
    try:
        return _parsed(text, name, PLAIN_LOADER)  # its complaints say more than libyaml's
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        reason = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise RecipeError(f"{name}:{line}: not valid YAML: {reason}") from None


def _bounded(text: str, name: str, kind: Any) -> None:
    """Refuse what costs more than a recipe can be worth, before anything is built of it.

    Aliases share one node, so that 300 bytes can stand for 10^7 leaves; deep nesting ends in Python's own limit.
    """
    depth = 0
    events: Any = yaml.parse(text, Loader=kind)
    for count, event in enumerate(events):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError(f"{name}:{line}: aliases (*{event.anchor}) are not read; write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEPTH:
            raise RecipeError(f"{name}:{line}: is nested more than {DEPTH} deep")
        if count > NODES:
            raise RecipeError(f"{name}:{line}: has more than {NODES} keys and values, which no recipe needs")


def _scalar(loader: Any, node: yaml.Node) -> Any:
    """A value that JSON has too, no larger than what trains; ValueError says what is wrong with it."""
    text = str(node.value)
    if node.tag.endswith(":merge"):
        raise ValueError("merge keys (<<) are not read; write the keys out, or use `extends`")
    short = text if len(text) < 40 else f"{text[:37]}..."
    if SURROGATE.search(text):
        raise ValueError(f"{short!r}: holds half of a surrogate pair, which is no character")
    if node.tag.endswith((":int", ":float")) and len(text) > DIGITS:
        raise ValueError(f"{short}: has more than {DIGITS} digits")
    try:
        value = loader.construct_object(node)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ValueError(f"{short!r} is not what its tag {node.tag.rpartition(':')[2]} says") from None
    if value is not None and not isinstance(value, (str, int, float)):
        raise ValueError(f"{short!r}: values of type {type(value).__name__} are not read")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{short}: does not fit into 64 bits")
    if isinstance(value, float) and value and math.isfinite(value) and not SMALLEST <= abs(value) <= LARGEST:
        raise ValueError(f"{short}: cannot be told from {'0' if abs(value) < SMALLEST else 'infinity'} in float32")
    return value


def _parsed(text: str, name: str, kind: Any) -> Source:
    _bounded(text, name, kind)
    loader = kind(text)
    root = loader.get_single_node()
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{name}:1: a recipe is a mapping of keys to values")
    lines: dict[Path_, tuple[str, int]] = {(): (name, 1)}
    problems: list[str] = []

    def scalar(node: yaml.Node, path: Path_) -> Any:
        try:
            return _scalar(loader, node)
        except ValueError as error:
            at = ".".join(map(str, path))
            raise RecipeError(f"{name}:{node.start_mark.line + 1}: {at}{': ' if at else ''}{error}") from None

    def walk(node: yaml.Node, path: Path_) -> Any:
        if isinstance(node, yaml.MappingNode):
            out: dict[str, Any] = {}
            for key_node, value_node in node.value:
                line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise RecipeError(f"{name}:{line}: a key must be a word, not a list or a mapping")
                key = str(scalar(key_node, path))
                at = (*path, key)
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
        return scalar(node, path)

    return Source(walk(root, ()), lines, tuple(problems))


def _same_part(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return not ("name" in a and "name" in b and a["name"] != b["name"])


def merge(base: Source, over: Source) -> Source:
    """`over` on top of `base`: mappings merge key by key, unless `name` changes: then the part is new."""

    def join(a: Any, b: Any) -> Any:
        if not (isinstance(a, dict) and isinstance(b, dict) and _same_part(a, b)):
            return b
        return {**a, **{k: join(a[k], v) if k in a else v for k, v in b.items()}}

    return Source(join(base.data, over.data), {**base.lines, **over.lines}, (*base.problems, *over.problems))


def override(source: Source, settings: Sequence[str]) -> Source:
    """Apply `key.path=value` settings; values are YAML. Raises RecipeError naming the argument."""
    for setting in settings:
        if not isinstance(setting, str):
            raise RecipeError(f"argument {setting!r}: expected text key=value, such as 'train.steps=200'")
        if SURROGATE.search(setting):
            raise RecipeError(f"argument {setting!r}: holds a byte that is no UTF-8")
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"argument {setting!r}: expected key=value, such as train.steps=200")
        try:
            given = parse(f"value: {value}", f"argument {setting!r}").data
        except RecipeError as error:
            reason = "" if "not valid YAML" in str(error) else f" ({str(error).rpartition('value: ')[2]})"
            raise RecipeError(f"argument {setting!r}: {value!r} is not a YAML value{reason}") from None
        if list(given) != ["value"]:
            raise RecipeError(f"argument {setting!r}: has more than one line; give each setting by itself")
        source = _assign(source, path_of(key), given["value"], f"argument {setting!r}")
    return source


def apply(source: Source, settings: Mapping[str, Any]) -> Source:
    """Settings as Python values, by keys such as "train" or "train.steps". Raises RecipeError naming the argument.

    A mapping changes key by key what stands there, as in a recipe that extends another: with a `name` of its own it is a
    new part. An empty one takes the place of what stands there, as on the command line. Values are what YAML has, tuples,
    paths, numbers of numpy and parts.
    """
    for key, value in settings.items():
        if not isinstance(key, str) or not key:
            raise RecipeError(f"argument {key!r}: expected a recipe's key, such as 'train.steps'")
        source = _apply(source, path_of(key), _plain(value, f"argument {key!r}"), f"argument {key!r}")
    return source


def _apply(source: Source, path: Path_, value: Any, named: str) -> Source:
    here: Any = source.data
    for k in path:
        here = here.get(str(k)) if isinstance(here, dict) else _item(here, k)
    if isinstance(value, dict) and value and isinstance(here, dict) and _same_part(here, value):
        for k, v in value.items():
            source = _apply(source, (*path, k), v, named)
        return source
    return _assign(source, path, value, named)


def _item(values: Any, k: str | int) -> Any:
    return values[k] if isinstance(values, list) and isinstance(k, int) and k < len(values) else None


def _plain(value: Any, named: str) -> Any:
    """The value as YAML would have given it."""
    value = plain(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, named) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v, named) for v in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, (str, bool, int, float)) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # of numpy or torch
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    what = f"{value}" if isinstance(value, float) else f"a {type(value).__name__}"
    raise RecipeError(f"{named}: {what} is no value of a recipe; give numbers, text, lists, mappings or parts")


def path_of(key: str) -> Path_:
    """The keys of a dotted path, list items by their number."""
    return tuple(int(k) if k.isascii() and k.isdigit() and len(k) < 10 else k for k in key.split("."))


def _assign(source: Source, path: Path_, value: Any, named: str) -> Source:
    """The source with a value at a path, whatever stood there; what is between is made."""
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
            raise RecipeError(f"{named}: {'.'.join(map(str, path[: depth + 1]))} has no keys")
    if isinstance(here, list):
        index = path[-1]
        if not isinstance(index, int) or index >= len(here):
            raise RecipeError(f"{named}: the list has {len(here)} entries")
        here[index] = value
    elif isinstance(here, dict):
        here[str(path[-1])] = value
    else:
        raise RecipeError(f"{named}: {'.'.join(map(str, path[:-1]))} has no keys")
    lines = {p: w for p, w in source.lines.items() if p[: len(path)] != path}
    fresh = {path[:n]: (named, 0) for n in range(1, len(path)) if path[:n] not in lines}
    return Source(data, {**lines, **fresh, path: (named, 0)}, source.problems)


def load_yaml(path: Path, shown: str | None = None) -> Source:
    """Read a YAML file; RecipeError names it when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # a path with a NUL, bytes that are no UTF-8
        raise RecipeError(f"{shown or path}: cannot be read: {error}") from None
    return parse(text, shown or str(path))
