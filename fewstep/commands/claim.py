"""A run directory claimed: new, continued or emptied; marked as fewstep's, and kept to one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.config import UserError
from fewstep.files import LOCK, MARK, atomic_path, clear_leftovers, locked, read_mark, remove_ours, write_mark
from fewstep.recipe.diff import differences
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import dump, load_run
from fewstep.train.resume import KIND

OURS = frozenset(
    (
        MARK,
        LOCK,
        "recipe.yaml",
        "origin.json",
        "log.jsonl",
        "checkpoints",
        "samples",
        "report",
        "health.png",
        "export",
        "lora",
        "fewstep",
        "wandb",
    )
)
"""What fewstep and its trackers write at the top of a run directory."""
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
    if not run.is_symlink() and read_mark(run) is None:
        raise UserError(
            f"{run}: is not a run directory that fewstep made; --force deletes only those. Choose another --out"
        )
    remove_ours(run, KIND, OURS, keep=(LOCK,))


def _refuse_links(run: Path) -> None:
    for name in (*FOLDERS, "recipe.yaml", "log.jsonl"):
        if (run / name).is_symlink():
            raise UserError(f"{run / name}: is a symbolic link; fewstep does not write through links in a run directory")


@contextmanager
def held(run: Path) -> Iterator[None]:
    """The run directory for this process alone; UserError names the process that trains in it."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file; choose another --out")
    run.mkdir(parents=True, exist_ok=True)
    with locked(run, "is being trained in"):
        yield


def write_origin(run: Path, checkpoint: Path, changed: list[str]) -> None:
    """origin.json: the checkpoint that a run began with, and the settings that differ from its recipe."""
    with atomic_path(run / "origin.json") as aside:
        aside.write_text(json.dumps({"from": str(checkpoint), "changed": changed}, indent=1))
