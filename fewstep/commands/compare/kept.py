"""What the runs of a comparison leave in its folder, and the folder itself; each file is checked when it is read."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.commands.report import checked_row
from fewstep.config import UserError
from fewstep.eval.protocol.evaluation import Evaluation, distance_of
from fewstep.files import atomic_path, locked, read_json, take

KIND = "comparison"
COSTS = ("updates", "planned_updates", "refused_updates", "seconds", "cpu_seconds", "network_calls", "peak_memory_mib")
"""Numbers of a run's result."""
BESIDE = ("evaluate.fitted=", "evaluate.teacher_steps=")
"""Settings of what stands beside the ranking."""
EVALUATION = frozenset(f.name for f in fields(Evaluation))


@contextmanager
def claimed(out: Path, resume: bool, content: Mapping[str, Any]) -> Iterator[None]:
    """Keep the folder: new, or one of the same comparison to continue (recipes and seeds may be added)."""
    take(out, KIND)
    with locked(out, "is being compared in"):
        _continue(out / "compare.json", out, resume, json.loads(json.dumps(content)))
        yield


def _continue(stamp: Path, out: Path, resume: bool, content: Mapping[str, Any]) -> None:
    if stamp.exists():
        if not resume:
            raise UserError(f"{out}: holds a comparison; continue it with --resume, or choose another --out")
        found = _stamp(stamp)
        before, now = dict(found["evaluation"]), dict(content["evaluation"])
        # Teachers stand beside the ranking; how many of their rows there are changes no student's.
        for beside in ("teacher_steps", "fitted"):
            before.pop(beside, None), now.pop(beside, None)
        wrong = [k for k in ("budget", "steps") if found[k] != content[k]]
        wrong += ["settings"] * (of_students(found["settings"]) != of_students(content["settings"]))
        wrong += ["evaluation"] * (before != now)
        if wrong:
            told = "; ".join(f"{k}: {found[k]} -> {content[k]}" for k in wrong)
            raise UserError(f"{out}: is a comparison with another {wrong[0]}, so it cannot be continued ({told})")
    write_json(stamp, content)


def _stamp(path: Path) -> dict[str, Any]:
    found = read_json(path)
    kinds = {"budget": str, "settings": list, "steps": list, "evaluation": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]
    if wrong:
        raise UserError(f"{path}: {wrong[0]} is not as fewstep writes it, so what was compared is not known; delete it")
    return found


def of_students(settings: Sequence[Any]) -> list[str]:
    """Settings of a comparison without those that change none of its students."""
    return [s for s in map(str, settings) if not s.startswith(BESIDE)]


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all; NaN is refused."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def evaluation_of(row: Mapping[str, Any]) -> Evaluation:
    """A row of a comparison or a board, without what these add to it."""
    return Evaluation.from_json({k: v for k, v in row.items() if k in EVALUATION})


def left_by(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is no whole one."""
    try:
        return read_json(path)
    except UserError:
        return None


def result_of(folder: Path, teacher: bool) -> dict[str, Any] | None:
    """The result of a run, or of a teacher's measurement; None where none is there as `work` writes it."""
    found = left_by(folder / "result.json")
    try:
        rows = [checked_row(row) for row in (found or {})["rows"]]
    except (KeyError, TypeError, ValueError):
        return None
    good = bool(rows) and all(_number(row.metrics[str(distance_of(row))]["value"]) for row in rows if distance_of(row))
    good = good and all(distance_of(row) and isinstance(row.steps, int) for row in rows)
    if not teacher:
        good = good and isinstance(found, dict) and isinstance(found.get("method"), str)
        good = good and all(_number((found or {}).get(key)) for key in COSTS)
    return found if good else None


def message_of(folder: Path) -> str:
    """Why a run has no result."""
    return str((left_by(folder / "failure.json") or {}).get("message") or "left no result")


def steps_of(path: Path, identity: str, stages: int) -> list[int] | None:
    """Steps of each stage in lengths.json; None where it is another recipe's, or none."""
    found = left_by(path) or {}
    steps = found.get("steps")
    whole = isinstance(steps, list) and len(steps) == stages and all(type(n) is int and n > 0 for n in steps)
    return steps if whole and found.get("recipe") == identity else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def keep_arrays(folder: Path, found: Sequence[Evaluation]) -> None:
    """Influences and pictures of a run in scores.npz, written before its result."""
    arrays: dict[str, np.ndarray] = {}
    for e in found:
        for name in ("influence", "curvature") if e.frechet else ():
            value = getattr(e.frechet[0], name)
            if value is not None:
                arrays[f"{name}-{e.steps}"] = value
        if e.images is not None:
            arrays[f"images-{e.steps}"] = e.images.numpy()
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "scores.npz") as temporary:
        np.savez(temporary, **arrays)


def read_evaluations(folder: Path, result: Mapping[str, Any]) -> list[Evaluation]:
    """The evaluations of a run with the arrays that `keep_arrays` wrote. UserError for a file that is not whole."""
    path = folder / "scores.npz"
    try:
        with np.load(path) as archive:
            arrays = {k: archive[k] for k in archive.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read: {error}; delete {folder / 'result.json'} to measure it again") from None
    out = []
    for row in result["rows"]:
        e = Evaluation.from_json(row)
        influence, images = arrays.get(f"influence-{e.steps}"), arrays.get(f"images-{e.steps}")
        if influence is not None:
            known = {"influence": influence, "curvature": arrays.get(f"curvature-{e.steps}")}
            e.frechet = [replace(e.distance, **known)]
        e.images = None if images is None else torch.from_numpy(images)
        out.append(e)
    return out
