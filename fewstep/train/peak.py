"""Where a run was best, from its log: after how many steps, and by what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.eval.protocol.evaluation import LESS_IS_BETTER
from fewstep.train.lines import TIE
from fewstep.train.verdicts import Course, Record, last_stage


@dataclass(frozen=True)
class Peak:
    """The best moment of the last stage."""

    done: int
    """Steps done, over all stages."""
    total: int
    """Of the whole log."""
    by: str
    """The metric's name, or `readings of samples`."""
    value: float
    """Of the metric, or the drift of the readings (`Course.drift`)."""

    def __str__(self) -> str:
        return f"best at step {self.done} of {self.total}, by {self.by} ({self.value:.4g})"


def peak(records: Sequence[Record]) -> Peak | None:
    """By the evaluations on the way where there are two or more, else by the readings; None without either.

    By readings it is the last moment without an alarm that is as good as the best one, but for chance.
    """
    records = [r for r in records if "done" in r]  # a line that an editor left may have none
    stage = last_stage(records)
    if not stage:
        return None
    number, total = stage[-1]["stage"], int(stage[-1]["done"])
    before = max((r["done"] for r in records if r.get("stage", number) != number), default=0)
    told = [(r["done"], *_distance(r["evaluation"])) for r in records if "evaluation" in r and r["done"] > before]
    measured = [(value, done, name) for done, name, value in told if math.isfinite(value)]
    if len(measured) > 1:
        value, done, name = min(measured)
        return Peak(int(done), total, name, value)
    course, drifts = Course(), []
    for record in stage:
        course.add(record)
        drift = course.drift() if any(k.startswith("samples/") for k in record) else None
        if drift is not None and math.isfinite(drift) and not course.alarms():
            drifts.append((drift, int(record["done"])))
    if not drifts:
        return None
    least = course.least if math.isfinite(course.least) else min(drifts)[0]
    value, done = [held for held in drifts if held[0] <= least + TIE][-1]
    return Peak(done, total, "readings of samples", value)


def _distance(metrics: object) -> tuple[str, float]:
    """Name and value of the first metric of which less is better; not finite where there is none."""
    held = metrics if isinstance(metrics, dict) else {}
    for name, entry in held.items():
        value = entry.get("value") if isinstance(entry, dict) else None
        if str(name).lower().startswith(LESS_IS_BETTER) and isinstance(value, int | float):
            return str(name), float(value)
    return "", math.nan
