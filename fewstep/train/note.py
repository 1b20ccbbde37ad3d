"""fewstep.json, what an export says of itself: how its network is sampled, and how its pipeline is called for that."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


@dataclass(frozen=True, kw_only=True)
class Note:
    """A student's sampler and how its pipeline is called to draw the same; a teacher has neither."""

    classes: int | None = None
    size: tuple[int, ...] | None = None
    """Height and width of x; of a video frames before them."""
    sampler: Sampler | None = None
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
        raise UserError(f"{file}: size is {json.dumps(size)}, not a height and a width; {again}")
    shape = None if size is None else tuple(size)
    if "steps" not in told:
        return Note(classes=classes, size=shape)
    if not isinstance(call, dict) or not set(call) & set(LEVELS):
        raise UserError(f"{file}: call does not say at which levels the network is called ({', '.join(LEVELS)}); {again}")
    settings = told.get("settings", {})
    if not isinstance(settings, dict):
        raise UserError(f"{file}: settings is no JSON object; {again}")
    return Note(classes=classes, size=shape, sampler=_sampler(told, file, again), call=call, settings=settings)


def _sampler(told: Mapping[str, Any], file: Path, again: str) -> Sampler:
    steps = told["steps"]
    levels = isinstance(steps, list) and steps and all(isinstance(u, int | float) and 0 <= u <= 1 for u in steps)
    if not levels or any(a <= b for a, b in pairwise(steps)):
        raise UserError(f"{file}: steps is {json.dumps(steps)[:60]}; expected decreasing levels in [0, 1]; {again}")
    try:
        return Sampler(kind=told.get("kind", "renoise"), steps=tuple(steps), eta=told.get("eta", Sampler().eta))
    except (RecipeError, TypeError, ValueError):
        raise UserError(f"{file}: kind or eta is not one of a sampler; {again}") from None
