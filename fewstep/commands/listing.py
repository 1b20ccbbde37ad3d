"""What ships, one line each: cut to the terminal, whole where it is read by another program."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 120
"""Columns of a terminal that has room for every field."""


def chosen(rows: Sequence[Mapping[str, Any]], words: Sequence[str]) -> list[Mapping[str, Any]]:
    """Rows in which every word stands somewhere, large or small letters alike."""
    wanted = [w.casefold() for w in words]
    texts = [" ".join(map(str, _flat(row.values()))).casefold() for row in rows]
    return [row for row, text in zip(rows, texts, strict=True) if all(w in text for w in wanted)]


def _flat(values: Any) -> list[Any]:
    return [v for value in values for v in (_flat(value) if isinstance(value, (list, tuple)) else [value])]


def as_json(rows: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(rows, indent=1, ensure_ascii=False)


def show(console: Console, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], extra: Sequence[str]) -> None:
    """Print rows one line each.

    Args:
        columns: heading of each field that is shown, the last of those that are not `extra` cut where it must be.
        extra: fields for terminals of WIDE columns and for pipes alone.
    """
    if not console.is_terminal:
        widths = {c: max((len(str(r[c])) for r in rows), default=0) for c in columns}
        for row in rows:
            line = "  ".join(str(row[c]).ljust(widths[c]) for c in columns)
            console.print(Text(line.rstrip()), soft_wrap=True)
        return
    shown = [c for c in columns if c not in extra or console.width >= WIDE]
    main = next(c for c in reversed(columns) if c not in extra)
    out = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    for c in shown:
        flexible = c == main or c in extra
        out.add_column(columns[c], no_wrap=True, overflow="ellipsis", ratio=(3 if c == main else 1) if flexible else None)
    for row in rows:
        out.add_row(*(Text(str(row[c])) for c in shown))
    console.print(out)
