"""`fewstep methods`: what ships, in a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def show_method(name: str, width: int = 100) -> str:
    """A method's card, and below it the keys that a recipe may set, with the lines at most `width` wide."""
    from fewstep.commands.explain import table
    from fewstep.config import REGISTRY
    from fewstep.recipe.cards import card, show
    from fewstep.recipe.fields import keys_of

    part = REGISTRY["method"].get(card(name).name)
    keys = ["", "  keys", *table(keys_of(part), width, "    ")] if part else []
    return "\n".join([show(name), *keys])


def list_methods() -> None:
    """Name, title and needs of each method."""
    from fewstep.recipe.cards import listing

    out = Table(box=None, pad_edge=False)
    for column in ("method", "what", "needs"):
        out.add_column(column, no_wrap=column == "method")
    for row in listing():
        out.add_row(*row)
    Console().print(out)
