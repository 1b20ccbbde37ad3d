"""What `fewstep run` may do with a run directory: start, --resume or --force; and where a run began."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.config import UserError
from fewstep.files import atomic_path, read_json
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


def write_origin(run: Path, told: Mapping[str, Any]) -> None:
    """origin.json: how a run was started or continued last.

    told: `recipe` and `settings` as they were given, the `environment`, and of a run by --from the checkpoint (`from`)
    and the settings that differ from its recipe (`changed`).
    """
    with atomic_path(run / "origin.json") as aside:
        aside.write_text(json.dumps(dict(told), indent=1))


def read_origin(run: Path) -> dict[str, Any]:
    """What `write_origin` wrote, as far as it is of the right kind; empty where nothing legible is recorded."""
    try:
        held = read_json(run / "origin.json")
    except UserError:
        return {}
    kinds = {"recipe": str, "settings": list, "environment": dict, "from": str, "changed": list}
    return {k: v for k, v in held.items() if isinstance(v, kinds.get(k, ()))}
