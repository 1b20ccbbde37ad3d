"""A run directory claimed: new, continued or emptied; marked as fewstep's, and kept to one process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
from fewstep.networks import code
from fewstep.recipe.diff import differences
from fewstep.recipe.pinned import as_begun, fetched, pinned, repositories
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


def is_used(run: Path) -> bool:
    """Whether a directory holds anything; UserError for a file."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file; choose another directory (--out)")
    return run.is_dir() and any(p.name != LOCK for p in run.iterdir())


def claim(recipe: Recipe, run: Path) -> None:
    """Make a run directory this recipe's: a new or empty one, or one in which it was trained before.

    A new one gets its recipe.yaml now, a used one, whose lengths may differ, when it trains on (`keep_recipe`). Its code
    is known as made here.

    Raises UserError, with nothing changed, for a directory that is something else's, for one in which another recipe
    was trained, and for folders in it that are links.
    """
    if is_used(run):
        refuse_links(run)
        if (read_mark(run) or {}).get("kind") != KIND:
            raise UserError(f"{run}: is not a run directory that fewstep made; choose another directory (--out)")
        changed = differences(load_run(run), recipe)
        if changed:
            raise UserError(
                f"{run}: was started with another recipe, so it cannot be resumed:\n  "
                + "\n  ".join(changed)
                + f"\nTo go on from its weights with other settings: --from {run} and another --out"
                " (in Python: Trainer.go_on_from)"
            )
    run.mkdir(parents=True, exist_ok=True)
    for folder in (run, *(run / name for name in FOLDERS)):
        clear_leftovers(folder)
    if not (run / "recipe.yaml").is_file():
        keep_recipe(recipe, run)
    if read_mark(run) is None:
        write_mark(run, KIND)
    code.remember(run, recipe)  # so that it opens without --trust-code on this machine


def settled(recipe: Recipe, run: str | Path | None = None, *, download: bool = False) -> Recipe:
    """The recipe at the commits of the hub's repositories that it names: those of the run that it goes on in.

    download: fetch what is not in the hub's cache. Absent, or UserError, says what to do about what is not there.
    """
    if not repositories(recipe):
        return recipe
    begun = None if run is None else Path(run)
    if begun is not None and (read_mark(begun) or {}).get("kind") == KIND and (begun / "recipe.yaml").is_file():
        recipe = as_begun(recipe, load_run(begun))
    if download:
        fetched(recipe)
    return pinned(recipe)


def keep_recipe(recipe: Recipe, run: Path) -> None:
    """Make recipe.yaml what is trained from now on."""
    with atomic_path(run / "recipe.yaml") as aside:
        aside.write_text(dump(recipe))


def clear(run: Path) -> None:
    """Empty a run directory but for its lock.

    Raises UserError, with nothing changed, for a link, for a directory that fewstep did not make and for one that holds
    somebody else's files.
    """
    foreign = "is not a run directory that fewstep made; --force deletes only those. Choose another --out"
    check_ours(run, KIND, foreign, OURS)
    empty(run, keep=(LOCK,))


def refuse_links(run: Path, names: Sequence[str] = (*FOLDERS, "recipe.yaml", "log.jsonl")) -> None:
    """UserError where one of the names, of what is written in a run directory, leads elsewhere."""
    for name in names:
        if (run / name).is_symlink():
            raise UserError(f"{run / name}: is a symbolic link; fewstep does not write through links in a run directory")


@contextmanager
def held(run: Path) -> Iterator[None]:
    """The run directory for this process alone; UserError names the process that trains in it."""
    if is_used(run) and (read_mark(run) or {}).get("kind") != KIND:
        yield  # somebody else's: `claim` refuses it, and nothing is written there
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
