"""What `fewstep run` may do with a run directory: start, --resume or --force."""

from __future__ import annotations

from pathlib import Path

from fewstep.config import UserError
from fewstep.recipe.schema import Recipe
from fewstep.train.claim import claim, clear, is_used


def prepare(recipe: Recipe, run: Path, resume: bool, force: bool) -> None:
    """Claim a run directory: new, or the same recipe's to continue, or emptied by --force.

    Raises UserError, with nothing changed, for a directory that is something else's, holds somebody else's files or
    is in use, and for folders in it that are links.
    """
    if is_used(run):
        if force:
            clear(run)
        elif not resume:
            raise UserError(f"{run}: is already used; continue it with --resume, or overwrite it with --force")
    claim(recipe, run)
