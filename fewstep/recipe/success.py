"""When a run has succeeded: `success: fd <= 1.5` in a recipe, read and judged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MEASURED = {
    "fd": "fd",
    "kid": "kid",
    "cmmd": "cmmd",
    "precision": "prdc",
    "recall": "prdc",
    "density": "prdc",
    "coverage": "prdc",
    "classifier score": "classifier-score",
    "class accuracy": "class-accuracy",
    "within-class diversity": "diversity",
    "energy": "energy",
    "caption found": "retrieval",
    "psnr of a sample": "psnr",
    "psnr of the mean": "psnr",
    "consistency": "consistency",
    "sharpness": "sharpness",
    "spread": "spread",
    "bond error": "bond-error",
    "chains with a clash": "clashes",
    "radius of gyration": "gyration",
    "1-nna": "1-nna",
    "right-handed turns": "handedness",
    "hanging voxels": "holes",
    "iou with the nearest": "overlap",
}
"""What may be asked for, the start of a name in a table in small letters, and the metric of a preset that measures it."""
_FORM = re.compile(r"\s*([a-z1][a-z -]*?)\s*(<=|>=)\s*(\S+)\s*")


@dataclass(frozen=True)
class Success:
    """A bound on a metric."""

    metric: str
    """A key of MEASURED."""
    at_most: bool
    bound: float

    def __str__(self) -> str:
        return f"{self.metric} {'<=' if self.at_most else '>='} {self.bound:g}"

    def value(self, metrics: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The metric's value among those of an evaluation, None where it is not there."""
        found = (entry["value"] for name, entry in metrics.items() if name.lower().startswith(self.metric))
        return next(found, None)

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def parse(text: str) -> Success:
    """ValueError for what is no `METRIC <= NUMBER` or `METRIC >= NUMBER`."""
    form = "expected METRIC <= NUMBER or METRIC >= NUMBER, such as fd <= 1.5"
    found = _FORM.fullmatch(text)
    if not found:
        raise ValueError(f"success: {form}, not {text!r}")
    metric, sign, number = found.groups()
    if metric not in MEASURED:
        raise ValueError(f"success: {metric!r} is not one of {', '.join(MEASURED)}")
    try:
        bound = float(number)
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise ValueError(f"success: {form}; {number!r} is no number")
    return Success(metric, sign == "<=", bound)
