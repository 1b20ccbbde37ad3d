"""`fewstep methods ls`: what ships, from the cards alone."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from fewstep.commands.listing import as_json, chosen, show
from fewstep.config import UserError

COLUMNS = {"name": "method", "title": "what", "needs": "needs"}


def show_method(name: str, width: int = 100) -> str:
    """A method's card, and below it the keys that a recipe may set, with the lines at most `width` wide."""
    from fewstep.commands.explain import table
    from fewstep.config import REGISTRY
    from fewstep.recipe.cards import card, show
    from fewstep.recipe.fields import keys_of

    part = REGISTRY["method"].get(card(name).name)
    keys = ["", "  keys", *table(keys_of(part), width, "    ")] if part else []
    return "\n".join([show(name), *keys])


def list_methods(words: Sequence[str] = (), json: bool = False, console: Console | None = None) -> None:
    """Name, title and needs of each method that has all words on its card's head, its other names among them."""
    from fewstep.recipe.cards import listing

    console = console or Console()
    rows = listing()
    found = chosen(rows, words)
    if not found:
        raise UserError(f"no method has {' '.join(words)!r}; `fewstep methods ls` lists all {len(rows)}")
    if json:
        console.print(as_json(found), soft_wrap=True, highlight=False, markup=False)
    else:
        show(console, found, COLUMNS, extra=("needs",))
