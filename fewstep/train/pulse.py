"""Leaps of a method's own samples from one update to the next: readings ten updates apart tell of them too late.

At twenty times its rate the student of digits-dmd2 has doubled its FD after three updates; the samples of the second one
are nineteen standard deviations from those before. What is compared are KEYS over an update's batch, of
`fewstep.methods.readings`; methods whose student draws no samples have none.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

from fewstep.train.lines import SHIFT, SHRINK
from fewstep.train.track import RECENT, settled_at

KEYS = ("health/mean", "health/mean_error", "health/deviation", "health/spread")
SEEN = 50
"""Updates that tell where samples have been. Of the first ones nothing is said: an adversarial student may lurch."""
GAP = 10
"""Updates between them and the last one: of a change that takes as long they are free."""
SWIFT = 2.0
"""Lines at which one update is enough, not two in a row."""
NOISE = 6.0
"""Standard deviations of the updates before, and standard errors of this one, which a leap exceeds as well."""
LEAST = 8
"""Samples of a micro-batch: fewer differ too much from one update to the next."""
LEAPS = {
    "leap/mean": ("the mean of an update's samples has leapt by {:+.2f} of their standard deviations", SHIFT),
    "leap/spread": ("the samples of an update suddenly spread {:.2f} times as far as those before", SHRINK),
}
"""What is said of a leap by its key in the log, and its line."""


class Pulse:
    """The own samples of the last updates of a stage.

    Args:
        rows: values by KEYS, update by update; what is no such row is left out.
    """

    def __init__(self, rows: Iterable[Sequence[float]] = ()) -> None:
        self.rows = deque[tuple[float, ...]](maxlen=SEEN + GAP)
        for row in rows:
            self._keep(row)

    def _keep(self, row: Sequence[float]) -> bool:
        numbers = isinstance(row, list | tuple) and all(isinstance(v, int | float) and math.isfinite(v) for v in row)
        if not numbers or len(row) != len(KEYS):
            return False
        self.rows.append(tuple(map(float, row)))
        return True

    def add(self, row: Sequence[float]) -> dict[str, float]:
        """The values of the next update; the leaps that it is in, by their keys in the log.

        An update with a value that is no number is passed over: it is refused, or seen in the samples that are drawn.
        """
        if not self._keep(row) or len(self.rows) < SEEN + GAP:
            return {}
        mean, error, deviation, spread = zip(*self.rows, strict=True)
        size = SHIFT * max(settled_at(list(deviation[:-GAP]))[0], 1e-12)
        out = {}
        if shift := _leap([m / size for m in mean], max(error[-RECENT:]) / size):
            out["leap/mean"] = SHIFT * shift
        shrunk = _leap([math.log(max(s, 1e-12)) / math.log(SHRINK) for s in spread], 0.0)
        if shrunk > 0:
            out["leap/spread"] = SHRINK**shrunk
        return out


def _leap(values: Sequence[float], error: float) -> float:
    """By how many lines the last of these, in lines, have left the others; 0 where they have not."""
    level, noise = settled_at(list(values[:-GAP]))
    apart = [v - level for v in values[-RECENT:]]
    nearer = min(apart, key=abs) if math.prod(apart) > 0 else 0.0
    found = apart[-1] if abs(apart[-1]) > SWIFT else nearer
    return found if abs(found) > max(1.0, NOISE * noise, NOISE * error) else 0.0
