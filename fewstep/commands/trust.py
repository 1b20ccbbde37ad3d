"""The code of a recipe that `run` and `compare` are asked for: shown, and allowed where it is the recipe's own."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.commands.report import say
from fewstep.networks import code
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import find


def allow_own_code(name: str, settings: Sequence[str], recipe: Recipe) -> None:
    """Print file and hash of the code that a recipe names, and allow it where the user chose it.

    It is the user's choice where it lies in the folder of the recipe's own file or below, or was given as a setting
    on the command line. Other code stays refused without --trust-code.
    """
    home = find(name).resolve().parent
    for key, value in code.named(recipe).items():
        path = code.file_of(value)
        typed = any(key == named or key.startswith(f"{named}.") for named in (s.partition("=")[0] for s in settings))
        own = path is not None and path.is_relative_to(home)
        if typed or own or code.is_allowed(value):
            code.allow(recipe)
            where = f"{path}, sha256 {code.digest(value)}" if path else "in no file that can be found"
            say(f"{key}: runs {value} ({where})")
