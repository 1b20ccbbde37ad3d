"""A JSON schema of recipe files, draft 2020-12, for editors: what may stand where, with the fields' docstrings.

It is about the file: a mapping without `name` changes a default key by key and a base may give what is left out, so no
key inside a part is required. What only a method or a folder can tell, `fewstep recipes check` tells.
"""

from __future__ import annotations

import json
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from fewstep.config import REGISTRY, OneOf, plain
from fewstep.recipe.fields import REQUIRED, Key, extends, keys_of, parts_in, recipe_parts, summary
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import EXTENDS

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}


def json_schema() -> dict[str, Any]:
    """The schema of a recipe file, as data."""
    parts = {_name(p): _mapping(p) for p in recipe_parts() if p is not Recipe}
    kinds = {f"kind.{kind}": _kind(kind) for kind in REGISTRY if any(_of_kind(p, kind) for p in recipe_parts())}
    whole = _mapping(Recipe)
    whole["properties"][EXTENDS] = _key(extends())
    needed = [k.name for k in keys_of(Recipe) if k.default is REQUIRED]
    head = {"$schema": DRAFT, "title": "fewstep recipe", "description": summary(Recipe)}
    return {**head, **whole, "anyOf": [{"required": [EXTENDS]}, {"required": needed}], "$defs": kinds | parts}


def text() -> str:
    """The schema as a file's text."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _of_kind(part: type, kind: str) -> bool:
    return part in REGISTRY[kind].values()


def _name(part: type) -> str:
    kind = next((kind for kind in REGISTRY if _of_kind(part, kind)), None)
    return f"{kind}.{part.name}" if kind else part.__name__  # type: ignore[attr-defined]


def _kind(kind: str) -> dict[str, Any]:
    """A part of a kind: the one that `name` tells, and where no name stands any that has the keys."""
    parts = REGISTRY[kind]
    names = [{"const": name, "description": summary(part)} for name, part in parts.items()]
    chosen = [
        {
            "if": {"properties": {"name": {"const": name}}, "required": ["name"]},
            "then": {"$ref": f"#/$defs/{kind}.{name}"},
        }
        for name in parts
    ]
    unnamed = {"if": {"not": {"required": ["name"]}}, "then": {"anyOf": [each["then"] for each in chosen]}}
    return {"type": "object", "properties": {"name": {"oneOf": names}}, "allOf": [*chosen, unnamed]}


def _mapping(part: type) -> dict[str, Any]:
    name = {"name": {"const": part.name}} if hasattr(part, "name") else {}
    keys = name | {k.name: _key(k) for k in keys_of(part)}
    return {"type": "object", "description": summary(part), "properties": keys, "additionalProperties": False}


def _key(key: Key) -> dict[str, Any]:
    out = {"description": key.doc, **_type(key.hint)}
    if key.above is not None:
        out["exclusiveMinimum"] = key.above
    if key.default is not REQUIRED:
        out["default"] = json.loads(json.dumps(plain(key.default)))
    return out


def _type(hint: Any) -> dict[str, Any]:
    if isinstance(hint, OneOf):
        return {"$ref": f"#/$defs/kind.{hint.kind}"}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    args, origin = get_args(hint), get_origin(hint)
    if hasattr(hint, "__metadata__"):
        mark = next((m for m in args[1:] if isinstance(m, OneOf)), None)
        limits = [m.gt for m in args[1:] if hasattr(m, "gt")]
        return _type(mark or args[0]) | ({"exclusiveMinimum": limits[0]} if limits else {})
    if origin is Literal:
        return {"enum": list(args)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(args[1])}
    if origin is tuple and Ellipsis in args:
        return {"type": "array", "items": _type(args[0])}
    if origin is tuple:
        fixed = {"minItems": len(args), "maxItems": len(args)}
        return {"type": "array", "prefixItems": [_type(a) for a in args], **fixed}
    if args:
        return {"anyOf": [_type(a) for a in args]}
    (part,) = parts_in(hint)
    return {"$ref": f"#/$defs/{_name(part)}"}
