"""fitted.json, what `fewstep fit` leaves: samplers of a frozen teacher, and what they were fitted on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from fewstep.algebra.sampling import Sampler
from fewstep.config import UserError
from fewstep.files import digest_of, read_json
from fewstep.networks.teachers import DiffusersTeacher
from fewstep.recipe.schema import Recipe
from fewstep.train.origins import origins_of
from fewstep.train.state import checkpoints

NAME = "fitted.json"
FORMAT = 1
KIND = "fit"
"""What the mark of its folder says."""
AGAIN = "fit it again with `fewstep fit`"

Source = Literal["folder", "run", "recipe"]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Samplers by their number of calls, of one teacher at one guidance scale.

    source: the teacher's folder or run, "" for `of` recipe, whose recipe.yaml stands beside. digest: of the teacher's
    files. noises, points, seed: what it was calibrated on. calls, seconds: what that took, network calls of single
    samples. rows: what was measured, as printed.
    """

    of: Source
    source: str
    digest: str
    guidance: float
    solver: str
    points: int
    noises: int
    seed: int
    samplers: tuple[Sampler, ...]
    calls: int = 0
    seconds: float = 0.0
    commit: str = "unknown"
    rows: tuple[Mapping[str, Any], ...] = field(default_factory=tuple)

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of calls that it was fitted for."""
        return tuple(len(s.steps) for s in self.samplers)

    def at(self, calls: int) -> Sampler:
        """The sampler of so many calls; UserError names those that there are."""
        for sampler in self.samplers:
            if len(sampler.steps) == calls:
                return sampler
        told = ", ".join(map(str, self.counts))
        raise UserError(f"--steps {calls}: was fitted for {told} calls; fit others with `fewstep fit --calls {calls}`")

    def check_guidance(self, scale: float | None, option: str) -> None:
        """UserError for another scale than that of the fit: levels and weights hold for the guided net alone."""
        if scale is not None and scale != self.guidance:
            raise UserError(
                f"{option} {scale:g}: this sampler was fitted at guidance {self.guidance:g} and holds there only; fit it "
                f"again with `fewstep fit --guidance {scale:g}`"
            )

    def text(self) -> str:
        """As it stands in the file."""
        told = asdict(self) | {"format": FORMAT}
        told["samplers"] = [{"steps": list(s.steps), "history": list(s.history)} for s in self.samplers]
        return json.dumps(told, indent=1)


def is_fit(folder: Path) -> bool:
    return (folder / NAME).is_file()


def read_fit(folder: Path) -> Fitted:
    """What a folder by `fewstep fit` says. UserError naming file and key where it is damaged."""
    file = folder / NAME
    told = read_json(file)
    if told.pop("format", None) != FORMAT:
        raise UserError(f"{file}: format is not {FORMAT}; {AGAIN}")
    kinds: dict[str, Any] = {
        "of": str,
        "source": str,
        "digest": str,
        "guidance": int | float,
        "solver": str,
        "points": int,
        "noises": int,
        "seed": int,
        "samplers": list,
        "calls": int,
        "seconds": int | float,
        "commit": str,
        "rows": list,
    }
    for key, kind in kinds.items():
        if not isinstance(told.get(key), kind) or isinstance(told[key], bool):
            raise UserError(f"{file}: {key} is {json.dumps(told.get(key))[:60]}, not as fewstep writes it; {AGAIN}")
    if told["of"] not in ("folder", "run", "recipe") or not told["samplers"]:
        raise UserError(f"{file}: names no teacher or no sampler; {AGAIN}")
    samplers = tuple(_sampler(s, file) for s in told.pop("samplers"))
    rows = tuple(r for r in told.pop("rows") if isinstance(r, dict))
    return Fitted(samplers=samplers, rows=rows, **{k: told[k] for k in kinds if k in told})


def _sampler(told: Any, file: Path) -> Sampler:
    steps: Any
    history: Any
    steps, history = (told.get(k) if isinstance(told, dict) else None for k in ("steps", "history"))
    lists = all(isinstance(v, list) and all(type(u) in (int, float) for u in v) for v in (steps, history))
    if not lists or not steps or not all(0 < u <= 1 for u in steps) or any(a <= b for a, b in pairwise(steps)):
        raise UserError(f"{file}: steps is {json.dumps(steps)[:60]}; expected decreasing levels in (0, 1]; {AGAIN}")
    try:
        return Sampler(kind="map", steps=tuple(map(float, steps)), history=tuple(map(float, history)))
    except ValueError:
        said = f"{json.dumps(history)[:60]}; expected one weight a step, the first 0"
        raise UserError(f"{file}: history is {said}; {AGAIN}") from None


def digest(of: Source, source: str, recipe: Recipe | None) -> str:
    """The digest of the teacher's files as they are now; "" for one that stands on none."""
    if of == "folder":
        return digest_of(DiffusersTeacher(path=source).files())
    if of == "run":
        newest = checkpoints(Path(source) / "checkpoints")[-1:]
        return digest_of(p for c in newest for p in c.glob("*.safetensors"))
    assert recipe is not None
    return origins_of(recipe).get("teacher", "")
