"""`fewstep recipes expect`: bands of losses and readings from the logs of reference runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fewstep.commands.write_recipe import without
from fewstep.config import UserError, plain
from fewstep.files import atomic_path
from fewstep.recipe.expected import Expected
from fewstep.recipe.store import load, load_run
from fewstep.train.bands import identity, make
from fewstep.train.log import read_log
from fewstep.train.state import checkpoints, read_origins


def identity_of(run: Path) -> dict[str, Any]:
    """That of a run directory, with the teacher as it was when its newest checkpoint was made."""
    held = checkpoints(run / "checkpoints")
    if not held:
        raise UserError(f"{run}: has no checkpoint, which says what teacher it had; train it with `fewstep run`")
    return identity(load_run(run), read_origins(held[-1]))


def bands(runs: Sequence[Path]) -> Expected:
    """Bands of run directories of one recipe; UserError where they are of several, or too short."""
    first: dict[str, Any] = {}
    logs = []
    for run in runs:
        log = run / "log.jsonl"
        if not log.is_file():
            raise UserError(f"{run}: has no log.jsonl; is it a run directory?")
        own = identity_of(run)
        first = first or own
        if own != first:
            wrong = next(k for k in own if own[k] != first[k])
            raise UserError(f"{run}: is no run of the recipe of {runs[0]}: their {wrong} differs")
        logs.append(read_log(log))
    return make(logs, first)


def text_of(expected: Expected) -> str:
    """The recipe's key as YAML, each list on a line."""
    return yaml.safe_dump({"expected": plain(expected)}, sort_keys=False, default_flow_style=None, width=110)


def expect(runs: Sequence[Path], into: Path | None) -> str:
    """The bands as text; written into a recipe file, in place of those it has, where one is given."""
    text = text_of(bands(runs))
    if into is None:
        return text
    if into.suffix not in (".yaml", ".yml") or not into.is_file():
        raise UserError(f"{into}: is no recipe file; `fewstep recipes cp NAME {into.with_suffix('.yaml')}` makes one")
    load(str(into))  # one that is wrong already is left as it is
    whole = without(into.read_text(encoding="utf-8"), "expected").rstrip("\n") + "\n" + text
    with atomic_path(into) as aside:
        aside.write_text(whole, encoding="utf-8")
    return f"{into}: bands of {len(runs)} run{'s' * (len(runs) > 1)}\n"
