"""The keys of a recipe: types, defaults, choices, and the docstrings that stand under the fields in the source.

Docstrings are read from the source files, by ast, and only for those who ask: checking a recipe needs none.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml

import fewstep.recipe.source as source
from fewstep.config import REGISTRY, OneOf, RecipeError, _close, plain
from fewstep.config.check import _hint, _options
from fewstep.recipe.schema import Recipe

REQUIRED = object()
"""Default of a key that must be given."""


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a part."""

    name: str
    hint: Any
    """Its type as `fewstep.config` resolves it, a OneOf for a part of a kind."""
    default: Any
    """A value, or REQUIRED."""
    doc: str
    above: Any = None
    """A limit that numbers must exceed."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a dotted key names: a part, or a key of one part or of several."""

    path: str
    part: type | None = None
    keys: tuple[tuple[type, Key], ...] = ()
    kind: str = ""
    """A kind of parts, such as times, that is no key of a recipe's top."""


@cache
def _written(module: str) -> dict[str, str]:
    """Docstrings under the assignments of a module, by NAME or CLASS.NAME; none where there is no source."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not Path(file).is_file():
        return {}
    found = {}

    def walk(body: list[ast.stmt], outer: str) -> None:
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{outer}{node.name}.")
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            if isinstance(target, ast.Name) and isinstance(text, str):
                found[outer + target.id] = " ".join(text.split())

    walk(ast.parse(Path(file).read_text(encoding="utf-8")).body, "")
    return found


def doc_of(part: type, key: str) -> str:
    """The docstring of a field, its own or inherited; "" where there is none."""
    return next((d for c in part.__mro__ if (d := _written(c.__module__).get(f"{c.__qualname__}.{key}"))), "")


def summary(part: type) -> str:
    """The first line of what a part says of itself."""
    return (inspect.getdoc(part) or "").partition("\n")[0]


@cache
def keys_of(part: type) -> tuple[Key, ...]:
    """The keys of a part in their order, without `name`."""
    told: Any = part
    out = []
    for name, field in told.__pydantic_fields__.items():
        if name != "name":
            default = REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
            above = next((m.gt for m in field.metadata if hasattr(m, "gt")), None)
            out.append(Key(name, _hint(part, name), default, doc_of(part, name), above))
    return tuple(out)


def extends() -> Key:
    """The one key of a recipe's file that is no key of the recipe."""
    return Key(source.EXTENDS, str, None, _written(source.__name__)["EXTENDS"])


def parts_in(hint: Any) -> tuple[type, ...]:
    """The parts that a value of a type may be, or hold in a list or a mapping."""
    out: list[type] = []
    for option in _options(hint):
        if dataclasses.is_dataclass(option):
            out.append(option)  # type: ignore[arg-type]
        elif get_origin(option) in (tuple, dict):
            out += [p for arg in get_args(option) if arg is not Ellipsis for p in parts_in(arg)]
    return tuple(dict.fromkeys(out))


def recipe_parts() -> tuple[type, ...]:
    """Every part that a recipe may hold at any depth, and the recipe itself."""
    found: dict[type, None] = {}
    todo: list[type] = [Recipe]
    while todo:
        part = todo.pop()
        if part not in found:
            found[part] = None
            todo += [inner for key in keys_of(part) for inner in parts_in(key.hint)]
    return tuple(found)


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
_MANY = {int: "whole numbers", float: "numbers", str: "texts"}


def type_of(hint: Any, above: Any = None) -> str:
    """A type in words, such as `list of numbers` or `fp32 or bf16`."""
    if isinstance(hint, OneOf):
        return f"a {hint.kind} part"
    marks = [m for m in get_args(hint)[1:] if isinstance(m, OneOf)] if hasattr(hint, "__metadata__") else []
    if marks:
        return type_of(marks[0])
    if hasattr(hint, "__metadata__"):
        return type_of(get_args(hint)[0])
    args, origin = get_args(hint), get_origin(hint)
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        plainer = [get_args(a)[0] if hasattr(a, "__metadata__") else a for a in args]
        if Ellipsis not in args:
            return "[" + ", ".join(type_of(a).removeprefix("a ") for a in args) + "]"
        return f"list of {_MANY.get(plainer[0], 'entries, each ' + type_of(args[0]))}"
    if origin is dict:
        return f"mapping of names to {_MANY.get(args[1], type_of(args[1]).removeprefix('a '))}"
    if args:
        return " or ".join(dict.fromkeys(type_of(a) for a in args))
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    return _WORDS[hint] + (f" above {above}" if above is not None else "")


def find(key: str) -> Found:
    """What a dotted key such as method.dmd2, train.ema_warmup, times.lognormal or optim.student.lr names.

    Between its words stand names of parts (method.dmd2.gan), roles (optim.student) and numbers (before.0), all of
    which may be left out. Raises RecipeError with the nearest name.
    """
    first, *rest = [w for w in key.split(".") if not w.isdigit()] or [key]
    top = {k.name: k for k in (*keys_of(Recipe), extends())}
    if first in top:
        found = Found(first, keys=((Recipe, top[first]),))
    elif first in REGISTRY:
        found = Found(first, kind=first)
    else:
        raise RecipeError(f"explain {key}: {first!r} is no key of a recipe{_nearest(first, top)}")
    for word in rest:
        found = _down(found, word, key)
    return found


def _nearest(word: str, top: dict[str, Key]) -> str:
    """Where a word stands that is no key of the top: a part's name, a key of train, evaluate or optim, or alike."""
    places = {k.name: f"{at}.{k.name}" for at in ("optim", "evaluate", "train") for k in _below(top[at])}
    places |= {name: f"{kind}.{name}" for kind, parts in REGISTRY.items() for name in parts}
    hint = f"; did you mean '{places[word]}'?" if word in places else _close(word, [*top, *REGISTRY])
    return hint or "; `fewstep explain` lists them"


def _below(key: Key) -> Iterator[Key]:
    return (k for part in parts_in(key.hint) for k in keys_of(part))


def _down(found: Found, word: str, key: str) -> Found:
    """What a word names below what was found."""
    path = f"{found.path}.{word}"
    inside = (found.part,) if found.part else tuple(dict.fromkeys(p for h in hints_of(found) for p in parts_in(h)))
    for part in inside:
        if getattr(part, "name", None) == word and part is not found.part:
            return Found(path, part=part)
    if keys := tuple((p, k) for p in inside for k in keys_of(p) if k.name == word):
        return Found(path, keys=keys)
    if any(get_origin(o) is dict for h in hints_of(found) for o in _options(h)):
        # The name of a role: what stands there is the mapping's part, of which the next word is a key, or a value.
        values = tuple((o, dataclasses.replace(k, hint=_value(k.hint))) for o, k in found.keys)
        return Found(path, keys=values)
    names = [getattr(p, "name", "") for p in inside if not found.part] + [k.name for p in inside for k in keys_of(p)]
    known = list(dict.fromkeys(n for n in names if n))
    told = _close(word, known) or (f"; it has {', '.join(known)}" if known else f"; {found.path} has no keys")
    raise RecipeError(f"explain {key}: {found.path} has no {word!r}{told}")


def _value(hint: Any) -> Any:
    return next(get_args(o)[1] for o in _options(hint) if get_origin(o) is dict)


def hints_of(found: Found) -> list[Any]:
    """Types of the keys that were found, and of a kind's parts; a part itself has none."""
    return [OneOf(found.kind)] if found.kind else [k.hint for _, k in found.keys]


def brief(value: Any) -> Any:
    """A value as plain data, of a part its name and the keys that differ from the part's own defaults."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return plain(value)
    name = {"name": value.name} if hasattr(value, "name") else {}
    own = {k.name: (getattr(value, k.name), k.default) for k in keys_of(type(value))}
    return name | {key: brief(given) for key, (given, default) in own.items() if given != default}


def shown(value: Any) -> str:
    """A value in one line of YAML."""
    flow = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return flow.removesuffix("...\n").strip()
