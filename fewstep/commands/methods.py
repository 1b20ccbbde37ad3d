"""`fewstep methods`: what ships, in a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def list_methods() -> None:
    """Name, title and needs of each method."""
    from fewstep.recipe.cards import listing

    out = Table(box=None, pad_edge=False)
    for column in ("method", "what", "needs"):
        out.add_column(column, no_wrap=column == "method")
    for row in listing():
        out.add_row(*row)
    Console().print(out)
