"""A recipe's YAML with a comment on every key: what the docstring of its field says."""

from __future__ import annotations

import textwrap
from typing import Any

from fewstep.config import parse
from fewstep.config.check import _inner, _part_of
from fewstep.recipe.fields import doc_of, summary
from fewstep.recipe.schema import Recipe

WIDTH = 100


def annotated(text: str) -> str:
    """Resolved YAML as `store.dump` writes it, its values unchanged, each key explained beside it or above it."""
    source, lines = parse(text, "recipe"), text.splitlines()
    begins = sorted(line for _, line in source.lines.values())
    above: dict[int, list[str]] = {}
    for path, (_, line) in source.lines.items():
        said = _said(source.data, path)
        if not said:
            continue
        own = lines[line - 1]
        # A text that goes on in the next line would take the comment for its own.
        whole = line + 1 in begins or line == len(lines)
        beside = f"{own}  # {said}"
        if whole and len(beside) <= WIDTH:
            lines[line - 1] = beside
        else:
            indent = " " * (len(own) - len(own.lstrip())) + "# "
            above[line] = textwrap.wrap(
                said, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
            )
    return "".join(f"{row}\n" for n, line in enumerate(lines, 1) for row in (*above.get(n, []), line))


def _said(data: Any, path: tuple[str | int, ...]) -> str:
    """The docstring of the key at a path of complete data; of `name`, what the part is; "" of roles and list items."""
    hint: Any = Recipe
    for n, key in enumerate(path):
        part = _part_of(hint, data)
        last = n == len(path) - 1
        if part is not None and last:
            return summary(part) if key == "name" else doc_of(part, str(key))
        hint = _inner(hint, data, key)
        data = data[key]
    return ""
