"""A run directory claimed: new, continued or emptied; marked as fewstep's, and kept to one process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.config import UserError
from fewstep.files import (
    LOCK,
    MARK,
    atomic_path,
    check_ours,
    clear_leftovers,
    empty,
    locked,
    read_json,
    read_mark,
    write_mark,
)
from fewstep.recipe.diff import differences
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import dump, load_run

_ANY = ".*"
OURS = {
    MARK: "",
    LOCK: "",
    "recipe.yaml": "",
    "origin.json": "",
    "log.jsonl": "",
    "health.png": "",
    "checkpoints": r"(\.?step-[^/]*|\.step-.*\.tmp)/.*",
    "samples": r"(step-\d+[\w.-]*|\..*\.fewstep-tmp)\.png",
    "report": r"(results\.json|(side-by-side|health)\.png|report\.(json|html)|run\.html|\w+-error\.txt"
    r"|\..*\.fewstep-tmp\.\w+)",
    "fewstep": _ANY,
    "wandb": _ANY,
}
"""What fewstep and its trackers write at the top of a run directory, with patterns of what its folders hold; an export
has a mark of its own."""
KIND = "run directory"
FOLDERS = ("checkpoints", "samples", "report")


def prepare(recipe: Recipe, run: Path, resume: bool, force: bool) -> None:
    """Claim a run directory: new, or the same recipe's to continue, or emptied by --force.

    Raises UserError, with nothing changed, for a directory that is something else's, holds somebody else's files or
    is in use, and for folders in it that are links.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file; choose another --out")
    used = run.is_dir() and any(p.name != LOCK for p in run.iterdir())
    if used:
        if force:
            _clear(run)
        elif not resume:
            raise UserError(f"{run}: is already used; continue it with --resume, or overwrite it with --force")
        else:
            _refuse_links(run)
            if read_mark(run) is None:
                raise UserError(f"{run}: is not a run directory that fewstep made; choose another --out")
            changed = differences(load_run(run), recipe)
            if changed:
                raise UserError(
                    f"{run}: was started with another recipe, so it cannot be resumed:\n  "
                    + "\n  ".join(changed)
                    + f"\nTo go on from its weights with other settings: --from {run} and another --out"
                )
    run.mkdir(parents=True, exist_ok=True)
    for folder in (run, *(run / name for name in FOLDERS)):
        clear_leftovers(folder)
    with atomic_path(run / "recipe.yaml") as aside:
        aside.write_text(dump(recipe))
    if read_mark(run) is None:
        write_mark(run, KIND)


def _clear(run: Path) -> None:
    foreign = "is not a run directory that fewstep made; --force deletes only those. Choose another --out"
    check_ours(run, KIND, foreign, OURS)
    empty(run, keep=(LOCK,))


def _refuse_links(run: Path) -> None:
    for name in (*FOLDERS, "recipe.yaml", "log.jsonl"):
        if (run / name).is_symlink():
            raise UserError(f"{run / name}: is a symbolic link; fewstep does not write through links in a run directory")


@contextmanager
def held(run: Path) -> Iterator[None]:
    """The run directory for this process alone; UserError names the process that trains in it."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file; choose another --out")
    if run.is_dir() and read_mark(run) is None and any(p.name != LOCK for p in run.iterdir()):
        yield  # somebody else's: `prepare` refuses it, and nothing is written there
        return
    run.mkdir(parents=True, exist_ok=True)
    with locked(run, "is being trained in"):
        yield


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
