"""A line of YAML that has a key: the shortest of the shipped recipes that have it, else one made of defaults."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, get_args, get_origin

import yaml

from fewstep.config import FAST_LOADER, REGISTRY, plain
from fewstep.config.check import _options
from fewstep.recipe.fields import REQUIRED, Found, Key, find, hints_of, keys_of, parts_in, shown
from fewstep.recipe.source import shipped

Step = tuple[str, str]
"""A step into a recipe: ("key", its name), ("part", its name) or ("list", "")."""


def example(found: Found) -> str:
    """One line of a recipe that has what was found, with the recipe's name where it is of a shipped one."""
    words = found.path.split(".")
    held = [(_nested(steps, value), name) for name, steps, value in _places(words)]
    if held:
        line, name = min(held, key=lambda pair: _fit(str(pair[0]), found.part is not None))
        return f"{shown(line)[1:-1]}  # {name}"
    return shown(_made_at(words, found))[1:-1]


def _fit(line: str, whole: bool) -> tuple[int, str]:
    """What the best example has least of: length; of a whole part the one with most of it that still fits a line."""
    return (-len(line) if whole and len(line) < 90 else len(line), line)


@cache
def _shipped() -> tuple[tuple[str, Any], ...]:
    return tuple((name, yaml.load(path.read_text(encoding="utf-8"), FAST_LOADER)) for name, path in shipped().items())


@cache
def _named(kind: str) -> tuple[tuple[str, Any], ...]:
    """Every mapping of the shipped recipes, at any depth, that names a part of a kind; each after its recipe's name."""
    return tuple((name, m) for name, data in _shipped() for m in _mappings(data) if m.get("name") in REGISTRY[kind])


def _places(words: list[str]) -> Iterator[tuple[str, list[Step], Any]]:
    """Recipe, steps and value of every place that has the words; null is no example."""
    if not find(words[0]).kind:
        yield from ((name, steps, value) for name, data in _shipped() for steps, value in _walk(data, words, []))
        return
    for name, node in _named(words[0]):
        if len(words) == 1 or node["name"] == words[1]:
            yield from ((name, steps, value) for steps, value in _walk(node, words[1:], [("key", words[0])]))


def _mappings(data: Any) -> Iterator[dict[str, Any]]:
    if isinstance(data, dict):
        yield data
    for inner in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from _mappings(inner)


def _walk(data: Any, words: list[str], steps: list[Step]) -> Iterator[tuple[list[Step], Any]]:
    if not words:
        if data is not None and data != {}:
            yield steps, data
    elif isinstance(data, list):
        for item in data:
            yield from _walk(item, words, [*steps, ("list", "")])
    elif isinstance(data, dict):
        word, *rest = words
        if data.get("name") == word and steps[-1] != ("part", word):  # the method segments has a key segments
            yield from _walk(data, rest, [*steps, ("part", word)])
        elif word in data:
            yield from _walk(data[word], rest, [*steps, ("key", word)])


def _nested(steps: list[Step], value: Any) -> Any:
    """A value under the keys, lists and names that lead to it."""
    for n, (kind, word) in reversed(list(enumerate(steps))):
        if kind == "list":
            value = [value]
        elif kind == "key":
            value = {word: value}
        elif n + 1 < len(steps):  # the last step into a part has its mapping whole
            value = {"name": word, **value}
    return value


def _made_at(words: list[str], found: Found) -> Any:
    """What `example` shows of a key that no shipped recipe has."""
    value = _made(found.part) if found.part else _value(found.keys[0][1])
    owner = None if found.part else found.keys[0][0]
    steps: list[Step] = []
    for n, word in enumerate(words):
        here = find(".".join(words[: n + 1]))
        steps.append(("key" if here.part is None else "part", word))
        lists = any(get_origin(o) is tuple and parts_in(o) for h in hints_of(here) for o in _options(h))
        if n + 1 < len(words) and lists:
            steps.append(("list", ""))
    named = getattr(owner, "name", None)
    if named is not None and len(steps) > 1 and steps[-2] != ("part", named):
        steps.insert(-1, ("part", named))
    return _nested(steps, value)


def _made(part: type) -> dict[str, Any]:
    """A part with its required keys alone."""
    name = getattr(part, "name", None)
    return ({"name": name} if name else {}) | {k.name: _value(k) for k in keys_of(part) if k.default is REQUIRED}


def _value(key: Key) -> Any:
    if key.default is not REQUIRED and key.default not in (None, (), {}):
        return plain(key.default)
    return _of(key.hint, key.name)


def _of(hint: Any, name: str) -> Any:
    """Some value of a type; text is the key's name in capitals."""
    option = _options(hint)[0]
    args, origin = get_args(option), get_origin(option)
    if origin is Literal:
        return args[0]
    if origin is tuple:
        return [_of(a, name) for a in args if a is not Ellipsis]
    if origin is dict:
        return {"ROLE": _of(args[1], name)}
    if option in (int, float, bool):
        return {int: 1, float: 1.0, bool: True}[option]
    return name.upper() if option is str else _made(parts_in(option)[0])
