"""`fewstep explain`: what a key of a recipe means, what it may be, and a line that has it."""

from __future__ import annotations

import inspect
import shutil
import textwrap

from fewstep.commands.example import example
from fewstep.recipe.fields import (
    REQUIRED,
    Found,
    Key,
    brief,
    extends,
    find,
    hints_of,
    keys_of,
    parts_in,
    shown,
    summary,
    type_of,
)
from fewstep.recipe.schema import Recipe


def explain(key: str | None, width: int = 100) -> str:
    """The text of `fewstep explain`, its lines at most `width` wide. RecipeError suggests the nearest key."""
    if key is None:
        lines = ["keys of a recipe; `fewstep explain KEY` says more, `fewstep explain method.dmd2` of a part", ""]
        return "\n".join([*lines, *table((*keys_of(Recipe), extends()), width)])
    found = find(key)
    lines = []
    if found.part is not None:
        lines += [f"{key}: {summary(found.part)}", *_more(found.part, width), *_keys_below(found.part, width)]
    elif found.kind:
        lines += [f"{key}: a kind of parts, chosen by name"]
    elif len(found.keys) == 1:
        lines += [f"{key}: {told(found.keys[0][1])}", *_wrapped(found.keys[0][1].doc, width, "  ")]
    else:
        for (kind, doc), owners in _alike(found).items():
            lines += [f"{key} of {', '.join(owners)}: {kind}", *_wrapped(doc, width, "  "), ""]
        lines = lines[:-1]
    if found.part is None:
        parts = tuple(dict.fromkeys(p for hint in hints_of(found) for p in parts_in(hint)))
        if len(parts) == 1:
            lines += _keys_below(parts[0], width)
        elif parts:
            named = [(str(getattr(p, "name", p.__name__)), p) for p in parts]
            wide = max(len(name) for name, _ in named)
            lines += ["", f"one of these; `fewstep explain {key}.{named[0][0]}` says more of one"]
            for name, p in named:
                lines += textwrap.wrap(f"{name:{wide}}  {summary(p)}", width, initial_indent="  ",
                                       subsequent_indent=" " * (wide + 4))  # fmt: skip
    return "\n".join([*lines, "", f"example  {example(found)}"])


def terminal_width() -> int:
    """Columns to write in: the terminal's, within what reads well."""
    return min(max(shutil.get_terminal_size().columns, 60), 110)


def told(key: Key) -> str:
    """Type and default in words."""
    default = "required" if key.default is REQUIRED else f"default {shown(brief(key.default))}"
    return f"{type_of(key.hint, key.above)}; {default}"


def table(keys: tuple[Key, ...], width: int, indent: str = "  ") -> list[str]:
    """Lines of a list of keys: name, type and default, and what it is below."""
    wide = max((len(k.name) for k in keys), default=0)
    out = []
    for k in keys:
        out += textwrap.wrap(f"{k.name:{wide}}  {told(k)}", width, initial_indent=indent,
                             subsequent_indent=indent + " " * (wide + 2))  # fmt: skip
        out += _wrapped(k.doc, width, indent + " " * (wide + 2))
    return out


def _keys_below(part: type, width: int) -> list[str]:
    keys = keys_of(part)
    return ["", "keys", *table(keys, width)] if keys else ["", "it has no keys"]


def _more(part: type, width: int) -> list[str]:
    """What a part's docstring says after its first line."""
    rest = (inspect.getdoc(part) or "").partition("\n")[2].strip()
    return [line for paragraph in rest.split("\n\n") for line in _wrapped(paragraph, width, "  ")] if rest else []


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _alike(found: Found) -> dict[tuple[str, str], list[str]]:
    """Parts that have a key, by what they say of it."""
    out: dict[tuple[str, str], list[str]] = {}
    for owner, key in found.keys:
        out.setdefault((told(key), key.doc), []).append(str(getattr(owner, "name", owner.__name__)))
    return out
