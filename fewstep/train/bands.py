"""Bands of losses and readings: made from the logs of reference runs, and a log compared with them."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from statistics import median
from typing import Any

from fewstep.config import UserError, stated
from fewstep.recipe.diff import SETTINGS
from fewstep.recipe.expected import Band, Expected
from fewstep.recipe.schema import Recipe
from fewstep.train.verdicts import Record, Verdict, last_stage

PARTS = 10
"""Parts of a stage, over each of which a reading is compared."""
WIDER = 0.5
"""Of the distance between the least and the largest record of a part, added on either side."""
NARROWEST = 0.05
"""Of a part's largest value: the width that a band has at least, where records are equal or nearly so."""
_UNIT = {"samples/mean": 1.0, "samples/offset": 1.0}
"""In place of the largest value where that is less: of deviations from the reference, 0 within what chance does."""
_LEFT_OUT = ("done", "stage", "skips", "skipped", "seconds", "lr/", "grad_norm/", "health/gradient_", "leap/")
_OF_TRAIN = ("accumulate", "clip", "precision", "ema", "ema_warmup", "product")
_PATHS = ("path", "shards", "vae", "text_cache")
"""Keys of data and teacher that say where files are; what they hold is told by the digests."""


def identity(recipe: Recipe, origins: Mapping[str, str]) -> dict[str, Any]:
    """What bands are of: batch, digests of the teacher's and the data's files and of what else readings depend on.

    origins: the run's, see `fewstep.train.origins`.
    """
    whole = stated(recipe)
    told = {k: whole.get(k) for k in SETTINGS} | {k: whole["train"].get(k) for k in _OF_TRAIN}
    told |= {k: _without_paths(whole.get(k)) if k in origins else whole.get(k) for k in ("data", "teacher")}
    told["origins"] = {k: origins[k] for k in ("encoder", "vae") if k in origins}
    told["guidance"] = recipe.shown_guidance()  # of the samples that those of the student are compared with
    if "reward" in recipe.role_names() and recipe.evaluate is not None:
        told["features"] = recipe.evaluate.metric, recipe.evaluate.features  # in which samples/fd is taken
    if any(spec.decay != "constant" for spec in recipe.optim.values()):
        told["steps"] = recipe.train.steps
    digest = hashlib.blake2b(json.dumps(told, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    held = {k: origins.get(k, "") for k in ("teacher", "data")}
    return {"batch": recipe.train.batch, **held, "recipe": digest}


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_paths(v) for k, v in value.items() if k not in _PATHS}
    return value


def differs(expected: Expected, own: Mapping[str, Any]) -> str:
    """Why bands are not those of a run with this `identity`; "" where they are."""
    if expected.batch != own["batch"]:
        return f"they are of train.batch {expected.batch}, this run has {own['batch']}"
    for key, text in (("teacher", "another teacher"), ("data", "other data")):
        if (theirs := getattr(expected, key)) != own[key]:
            return f"they are of {text} ({theirs or 'none'}, here {own[key] or 'none'})"
    if expected.recipe != own["recipe"]:
        return "they are of other settings of method, networks, rates, data, teacher, train or evaluate.guidance"
    return ""


def beginning(records: Sequence[Record]) -> int:
    """Updates done before the last stage of a log."""
    stage = last_stage(records)
    before = [int(r["done"]) for r in records if "stage" in r and stage and r["stage"] != stage[-1]["stage"]]
    return max(before, default=0)


def readings(records: Sequence[Record]) -> list[tuple[int, Record]]:
    """The last stage's records with the number of its updates that each was made after."""
    start = beginning(records)
    return [(int(r["done"]) - start, r) for r in last_stage(records)]


def make(logs: Sequence[Sequence[Record]], own: Mapping[str, Any]) -> Expected:
    """Bands of reference runs from their logs; `own` is the identity that they share.

    The band of a part is from the least to the largest record in it over all runs, and half their distance more on
    either side: what is compared with it is a median. A part with fewer than two records takes those of the parts
    beside it as well; a reading with a part without any, or that is no number somewhere, has no band. So each of the
    logs is within. UserError for logs that are too short.
    """
    runs = [readings(log) for log in logs]
    shortest = min((run[-1][0] for run in runs if run), default=0)
    fewest = min((sum(n <= shortest for n, _ in run) for run in runs), default=0)
    if fewest < 2 * PARTS:
        raise UserError(f"bands need {2 * PARTS} records of the last stage from each run, one has {fewest}")
    ends = tuple(round(shortest * (i + 1) / PARTS) for i in range(PARTS))
    names = sorted({k for run in runs for _, r in run for k in r if not k.startswith(_LEFT_OUT)})
    bands: dict[str, Band] = {}
    for name in names:
        each = [_parts(run, ends, name) for run in runs]
        flat = [[v for part in parts for v in part] for parts in zip(*each, strict=True)]
        if all(flat) and all(math.isfinite(v) for part in flat for v in part):
            ranges = [_band(_filled(flat, i), _UNIT.get(name, 0.0)) for i in range(PARTS)]
            lows, highs = zip(*ranges, strict=True)
            bands[name] = Band(low=lows, high=highs)
    return Expected(runs=len(logs), ends=ends, bands=bands, **own)


def _filled(parts: Sequence[list[float]], i: int) -> list[float]:
    """The records of a part, or of the three around it where it has one alone."""
    return parts[i] if len(parts[i]) > 1 else [v for part in parts[max(0, i - 1) : i + 2] for v in part]


def _band(values: Sequence[float], unit: float) -> tuple[float, float]:
    """Ends of a band in four digits, the lower one rounded down and the upper one up."""
    low, high = min(values), max(values)
    narrowest = NARROWEST * max(unit, abs(low), abs(high))
    beside = max(WIDER * (high - low), (narrowest - (high - low)) / 2)
    return _short(low - beside, ROUND_FLOOR), _short(high + beside, ROUND_CEILING)


def _short(value: float, rounding: str) -> float:
    return float(Context(prec=4, rounding=rounding).create_decimal(repr(value)))


def _parts(run: Sequence[tuple[int, Record]], ends: Sequence[int], name: str) -> list[list[float]]:
    """The values of a reading in each part; later ones are left out."""
    out: list[list[float]] = [[] for _ in ends]
    for n, record in run:
        value = record.get(name)
        if n <= ends[-1] and isinstance(value, int | float):
            out[bisect_left(ends, n)].append(float(value))
    return out


def compared(records: Sequence[Record], expected: Expected) -> list[Verdict]:
    """Whether a log is within the bands: one verdict where it is, else one for each reading that has left, first first.

    A part counts once the run has passed it, or has three records in it.
    """
    run = readings(records)
    done = run[-1][0] if run else 0
    left: list[tuple[int, Verdict]] = []
    seen = 0
    for name, band in expected.bands.items():
        parts = _parts(run, expected.ends, name)
        for end, low, high, values in zip(expected.ends, band.low, band.high, parts, strict=True):
            if not values or (done < end and len(values) < 3):
                continue
            seen += 1
            value = median(values) if all(map(math.isfinite, values)) else math.nan
            if not low <= value <= high:
                left.append((end, _left(name, value, low, high, end, expected)))
                break
    if not seen:
        return []
    if left:
        return [v for _, v in sorted(left, key=lambda pair: pair[0])]
    text = f"within the band of the {_runs(expected)}"
    return [Verdict("as expected", "fine", float(len(expected.bands)), 0.0, text)]


def _runs(expected: Expected) -> str:
    return f"{expected.runs} reference runs" if expected.runs > 1 else "reference run"


def _left(name: str, value: float, low: float, high: float, end: int, expected: Expected) -> Verdict:
    first = expected.ends[expected.ends.index(end) - 1] if end != expected.ends[0] else 0
    line = high if value > high else low
    text = (
        f"{name} left the band of the {_runs(expected)} in updates {first + 1} to {end}: {value:.4g}, "
        f"expected {low:.4g} to {high:.4g}"
    )
    return Verdict(f"{name} unexpected", "warn", value, line, text)
