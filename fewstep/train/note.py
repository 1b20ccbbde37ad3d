"""fewstep.json, what an export says of itself: how its network is sampled, and how its pipeline is called for that."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from fewstep.algebra.sampling import Sampler
from fewstep.config import RecipeError, UserError
from fewstep.files import read_json

NAME = "fewstep.json"
LEVELS = ("num_inference_steps", "timesteps", "sigmas")
"""The arguments of a call that say at which levels the network is called."""
TABLES = ("DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler", "TCDScheduler")
"""Schedulers whose timesteps are rows of a table of T: row r is level (r + 1) / T."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return type(value) is int and 0 < value <= 65_536


def _levels(value: Any) -> bool:
    return value is None or (isinstance(value, list) and bool(value) and all(map(_number, value)))


CALL: Mapping[str, Callable[[Any], bool]] = {
    "num_inference_steps": lambda v: v is None or _count(v),
    "timesteps": _levels,
    "sigmas": _levels,
    "eta": _number,
    "strength": lambda v: v == 1,
    "max_timesteps": lambda v: v is None,
    "intermediate_timesteps": lambda v: v is None,
}
SETTINGS: Mapping[str, Callable[[Any], bool]] = {
    "guidance_scale": _number,
    "true_cfg_scale": _number,
    "num_frames": _count,
    "frames": _count,
    "height": _count,
    "width": _count,
    "max_sequence_length": _count,
    "complex_human_instruction": lambda v: v is None,
    "clean_caption": lambda v: isinstance(v, bool),
    "use_resolution_binning": lambda v: isinstance(v, bool),
}
"""The arguments that exports write, and whether a value may be one's."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """A student's sampler and how its pipeline is called to draw the same; a teacher has neither."""

    classes: int | None = None
    size: tuple[int, ...] | None = None
    """Height and width of x; of a video frames before them."""
    sampler: Sampler | None = None
    """On the grid that the written scheduler's config describes."""
    levels: tuple[float, ...] | None = None
    """sigma / (alpha + sigma) of the trained steps, first to last, whatever scheduler was written."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's call that set the levels."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its other arguments but prompt and classes: guidance, and size and tokens where they are not its defaults."""

    def text(self) -> str:
        """As it stands in the file."""
        told: dict[str, Any] = {k: v for k, v in asdict(self).items() if k in ("classes", "size") and v is not None}
        if self.sampler is not None:
            s = self.sampler
            told |= {
                "kind": s.kind,
                "steps": list(s.steps),
                "eta": s.eta,
                **({"history": list(s.history)} if s.history else {}),
                **({"levels": list(self.levels)} if self.levels else {}),
                "call": dict(self.call),
                "settings": dict(self.settings),
            }
        return json.dumps(told)


def read_note(folder: Path) -> Note:
    """The note of a folder, empty where there is no file. UserError naming file and key where it is damaged."""
    file = folder / NAME
    if not file.is_file():
        return Note()
    told = read_json(file)
    again = "export the run again"
    size, classes, call = told.get("size"), told.get("classes"), told.get("call", {})
    if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 0):
        raise UserError(f"{file}: classes is {json.dumps(classes)}, not a number of classes; {again}")
    if size is not None and not (
        isinstance(size, list) and len(size) in (2, 3) and all(type(n) is int and n > 0 for n in size)
    ):
        raise UserError(f"{file}: size is {json.dumps(size)}, not a height and a width, nor frames before them; {again}")
    shape = None if size is None else tuple(size)
    if "steps" not in told:
        return Note(classes=classes, size=shape)
    settings = told.get("settings", {})
    for name, held, known in (("call", call, CALL), ("settings", settings, SETTINGS)):
        if not isinstance(held, dict):
            raise UserError(f"{file}: {name} is no JSON object; {again}")
        for key, value in held.items():
            if key not in known:
                raise UserError(f"{file}: {name}.{key[:40]} is no argument that fewstep writes; {again}")
            if not known[key](value):
                raise UserError(f"{file}: {name}.{key} cannot be {json.dumps(value)[:60]}; {again}")
    if not any(call.get(key) for key in LEVELS):
        raise UserError(f"{file}: call does not say at which levels the network is called ({', '.join(LEVELS)}); {again}")
    sampler = _sampler(told, file, again)
    if wrong := _disagrees(call, sampler.steps, folder):
        raise UserError(f"{file}: {wrong}; {again}")
    levels = told.get("levels")
    if levels is not None and (not _levels(levels) or len(levels) != len(sampler.steps)):
        raise UserError(f"{file}: levels is {json.dumps(levels)[:60]}, not a number for each of the steps; {again}")
    trained = tuple(levels) if levels else None
    return Note(classes=classes, size=shape, sampler=sampler, levels=trained, call=call, settings=settings)


def _disagrees(call: Mapping[str, Any], steps: tuple[float, ...], folder: Path) -> str:
    """How a pipeline called so would leave the student's steps, "" where it keeps them or only its scheduler can say."""
    count, timesteps, sigmas = (call.get(key) for key in LEVELS)
    if count is not None and count != len(steps):
        return f"call.num_inference_steps is {count}, but there are {len(steps)} steps"
    for key, given in (("timesteps", timesteps), ("sigmas", sigmas)):
        # SCMScheduler wants the end, 0, beside the number of steps.
        if given is not None and len(given) != len(steps) and not (count and [*given[:-1], 0] == given):
            return f"call.{key} has {len(given)} levels, but there are {len(steps)} steps"
    config = folder / "scheduler" / "scheduler_config.json"
    held = read_json(config) if config.is_file() else {}
    rows: Any = held.get("num_train_timesteps")
    kind = held.get("_class_name")
    levels, close = None, 1e-6
    if sigmas is not None:
        key, levels = "sigmas", list(sigmas)
    elif timesteps is not None and _count(rows) and kind in TABLES:
        key, levels, close = "timesteps", [(r + 1) / rows for r in timesteps], 0.6 / rows
    elif timesteps is not None and _count(rows) and rows > 1 and kind == "CMStochasticIterativeScheduler":
        key, levels = "timesteps", [1 - r / (rows - 1) for r in sorted(timesteps)]
    if levels is not None and any(abs(a - b) > close for a, b in zip(levels, steps, strict=True)):
        return f"call.{key} stands at the levels {[round(u, 6) for u in levels]}, steps at {[round(u, 6) for u in steps]}"
    return ""


def _sampler(told: Mapping[str, Any], file: Path, again: str) -> Sampler:
    steps = told["steps"]
    levels = isinstance(steps, list) and steps and all(isinstance(u, int | float) and 0 <= u <= 1 for u in steps)
    if not levels or any(a <= b for a, b in pairwise(steps)):
        raise UserError(f"{file}: steps is {json.dumps(steps)[:60]}; expected decreasing levels in [0, 1]; {again}")
    try:
        more = {"eta": told.get("eta", Sampler().eta), "history": tuple(told.get("history", ()))}
        return Sampler(kind=told.get("kind", "renoise"), steps=tuple(steps), **more)
    except (RecipeError, TypeError, ValueError):
        raise UserError(f"{file}: kind, eta or history is not one of a sampler; {again}") from None
