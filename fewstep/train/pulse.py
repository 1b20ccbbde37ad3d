"""Leaps of a method's own samples from one update to the next: readings ten updates apart tell of them too late.

At twenty times its rate the student of digits-dmd2 has doubled its FD after three updates; the samples of the second one
are nineteen standard deviations from those before. What is compared are means over an update's batch, `health/mean`,
`health/deviation` and `health/diversity` of `fewstep.methods.readings`; methods whose student draws no samples have none.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median, pstdev

from fewstep.train.lines import SHIFT, SHRINK
from fewstep.train.track import RECENT

KEYS = ("health/mean", "health/deviation", "health/diversity")
SEEN = 50
"""Updates that tell where samples have been. Of the first ones nothing is said: an adversarial student may lurch."""
GAP = 10
"""Updates between them and the last one: of a change that takes as long they are free."""
SWIFT = 2.0
"""Lines at which one update is enough, not two in a row."""
NOISE = 6.0
"""Standard deviations of the updates before, which a leap exceeds as well."""
LEAPS = {
    "leap/mean": ("the mean of an update's samples has leapt by {:+.2f} of their standard deviations", SHIFT),
    "leap/diversity": ("the samples of an update suddenly spread {:.2f} times as far as those before", SHRINK),
}
"""What is said of a leap by its key in the log, and its line."""


class Pulse:
    """The own samples of the last updates of a stage.

    Args:
        rows: values by KEYS, update by update.
    """

    def __init__(self, rows: Iterable[Sequence[float]] = ()) -> None:
        self.rows = deque[tuple[float, ...]]((tuple(r) for r in rows), maxlen=SEEN + GAP)

    def add(self, row: Sequence[float]) -> dict[str, float]:
        """The values of the next update; the leaps that it is in, by their keys in the log."""
        if not all(map(math.isfinite, row)):
            return {}  # refused, or seen as such in the samples that are drawn
        self.rows.append(tuple(row))
        if len(self.rows) < SEEN + GAP:
            return {}
        mean, deviation, diversity = zip(*self.rows, strict=True)
        size = max(median(deviation[:-GAP]), 1e-12)
        out = {}
        if shift := _leap([m / (SHIFT * size) for m in mean]):
            out["leap/mean"] = SHIFT * shift
        shrunk = _leap([math.log(max(d, 1e-12)) / math.log(SHRINK) for d in diversity])
        if shrunk > 0:
            out["leap/diversity"] = SHRINK**shrunk
        return out


def _leap(values: Sequence[float]) -> float:
    """By how many lines the last of these, in lines, have left the others; 0 where they have not."""
    past, recent = values[:-GAP], values[-RECENT:]
    level = median(past)
    apart = [v - level for v in recent]
    nearer = min(apart, key=abs) if math.prod(apart) > 0 else 0.0
    found = apart[-1] if abs(apart[-1]) > SWIFT else nearer
    return found if abs(found) > max(1.0, NOISE * pstdev(past, level)) else 0.0
