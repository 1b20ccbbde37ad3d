"""Recipes as `fewstep new` writes them: lines of YAML, each with a comment on where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fewstep.config import UserError

Lines = list[tuple[str, str]]
"""(line of YAML, where it comes from)."""


def rendered(lines: Iterable[tuple[str, str]]) -> str:
    """The text of a recipe. ValueError for a line that does not say where it comes from."""
    out = []
    for line, source in lines:
        if not source:
            raise ValueError(f"{line!r} does not say where it comes from")
        out.append(f"{line}  # {source}\n")
    return "".join(out)


def quoted(path: Path | str) -> str:
    """A path as YAML text."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def levels(count: int, table: int | None = None, top: float = 1.0) -> str:
    """`count` levels from `top` down, evenly spaced, as a YAML list; on the knots of a table of so many indices."""
    spaced = [top * (1 - i / count) for i in range(count)]
    if table:
        spaced = [round(u * table) / table for u in spaced]
    return "[" + ", ".join(f"{round(u, 6)}" for u in spaced) + "]"


def power_below(limit: int) -> int:
    """The largest power of two that is at most `limit`."""
    return 1 << (max(limit, 1).bit_length() - 1)


def evaluation() -> Lines:
    """What is measured at the end of a run of a pipeline: nothing, for its data need not be pictures."""
    return [("evaluate: null", "`fewstep eval RUN --against FOLDER` measures it against pictures of yours")]


def one_of(what: str, given: str, allowed: Sequence[str], instead: str) -> None:
    """UserError for a method that `fewstep new` does not write."""
    from fewstep.config import _close

    if given not in allowed:
        near = _close(given, allowed) or f"; {instead}"
        raise UserError(f"--method {given}: `fewstep new` writes {', '.join(allowed)} {what}{near}")
