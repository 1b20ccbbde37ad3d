"""The course of a method's own samples over its log's records: a drift that takes tens of updates.

A darkening moves the mean of digits-dmd2's own samples, 640 in ten updates, by .3 of its line within the first ten; the
few samples that are drawn beside the training tell of it when it has taken two thirds. There is no reference to compare
with, only where the samples have been.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.train.lines import SHIFT
from fewstep.train.pulse import KEYS
from fewstep.train.track import GAP, LEAVE, NOISE, RECENT, SETTLED, settled_at

BLOCK = 10
"""Updates that are taken together, at least: what a record holds where it holds more."""
ERRORS = 4.0
"""Standard errors of a block's own samples that a drift exceeds, beside LEAVE and NOISE: that of digits-dmd2 stays within
0.08 lines, the darkening's first block moves by 0.3. Micro-batches are taken for one, so that theirs is too large."""
BESIDE = ("samples/", "leap/", "health/", "grad_norm/", "lr/", "skipped")
"""Begin names in a record that come and go without the method having changed."""


class Drift:
    """Means of the blocks of a stage."""

    def __init__(self) -> None:
        self._blocks = deque[tuple[float, float, float]](maxlen=SETTLED + GAP + RECENT)
        """Mean, its standard error, and the deviation of values, of each."""
        self._open: list[tuple[float, float, float, float]] = []
        """Updates, mean, standard error and deviation of the records of one that is not full."""
        self._done: float | None = None
        self._names: set[str] = set()

    def add(self, record: Mapping[str, Any]) -> None:
        """The next record, of the updates since the one before; the stage's first tells only where it begins.

        One that says nothing of the method's samples is passed over, and one of single samples, whose error is unknown. A
        name that no record had before is something that has set in, a reward or another loss: it begins anew.
        """
        names = {name for name in record if not name.startswith(BESIDE)}
        if not names <= self._names and self._names:
            self._blocks.clear()
            self._open.clear()
        self._names |= names
        done, row = record.get("done"), [record.get(key, math.nan) for key in KEYS[:3]]
        if not isinstance(done, int | float):
            return
        updates, self._done = (0.0 if self._done is None else done - self._done), float(done)
        if updates <= 0 or not all(isinstance(v, int | float) and math.isfinite(v) for v in row) or row[1] <= 0:
            return
        mean, error, deviation = map(float, row)
        self._open.append((updates, mean, error, deviation))
        if (count := sum(n for n, *_ in self._open)) >= BLOCK:
            mean, error, deviation = (math.fsum(r[0] * r[i] for r in self._open) / count for i in (1, 2, 3))
            self._blocks.append((mean, error / math.sqrt(count), deviation))
            self._open.clear()

    def left(self) -> tuple[float, float] | None:
        """By how many deviations of their values samples have moved, and how far they may; None where they have not.

        The nearer of the last two blocks, from the median of SETTLED, GAP before them, or from where those were heading:
        a student that moves evenly is on its way.
        """
        if len(self._blocks) < SETTLED + GAP + RECENT:
            return None
        means, errors, deviations = zip(*self._blocks, strict=True)
        size = SHIFT * max(settled_at(list(deviations[:SETTLED]))[0], 1e-12)
        values = [m / size for m in means]
        level, noise = settled_at(values[:SETTLED])
        apart = [v - x for v, h in zip(values[-RECENT:], heading(values), strict=True) for x in (level, h)]
        limit = max(LEAVE, NOISE * noise, ERRORS * max(errors[-RECENT:]) / size)
        if min(apart) <= 0 <= max(apart) or min(map(abs, apart)) <= limit:
            return None
        return SHIFT * min(apart, key=abs), SHIFT * math.copysign(limit, apart[0])


def heading(values: Sequence[float]) -> list[float]:
    """The straight line through the first SETTLED of these, by least squares, at the last RECENT."""
    middle = (SETTLED - 1) / 2
    mean = math.fsum(values[:SETTLED]) / SETTLED
    slope = math.fsum((i - middle) * v for i, v in enumerate(values[:SETTLED])) / (SETTLED * (SETTLED**2 - 1) / 12)
    return [mean + slope * (i - middle) for i in range(len(values) - RECENT, len(values))]
