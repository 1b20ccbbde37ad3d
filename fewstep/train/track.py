"""The course of one reading of drawn samples: the last two, the nearest that it has been, and where it has settled."""

from __future__ import annotations

import math
from collections import deque
from statistics import median, pstdev
from typing import Any

from fewstep.train.lines import Reading

RECENT = 2
"""Readings of samples in a row that are judged together, by the one that is nearer to the reference."""
SETTLED = 10
"""Readings before these, from which on it is known where a reading has settled."""
PAST = 20
"""The last readings that tell it."""
LEAVE = 0.3
"""By how much of its line a settled reading may move away, twice in a row. Of digits-dmd2 one moves by 0.2 at most."""
NOISE = 3.0
"""And by how many standard deviations of those that tell where it has settled."""


class Track:
    """The values of one reading.

    Args:
        reading: how it is judged.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading, self.recent = reading, deque[float](maxlen=RECENT)
        self.best = math.inf
        """Least badness that readings in a row have not exceeded so far; the stage's first counts alone."""
        self.count = 0
        self._course = deque[float](maxlen=PAST + RECENT)

    def add(self, value: float, course: Any = None) -> None:
        """The next value; course: that of the reading whose course is followed, where there is one."""
        self.recent.append(value)
        self.count += 1
        self.best = min(self.best, max(map(self.reading.badness, self.recent)))
        self._course.append(self.reading.signed(float(course) if isinstance(course, int | float) else value))

    @property
    def settled(self) -> bool:
        """There are readings enough before the last ones."""
        return self.count >= SETTLED + RECENT

    def left(self) -> tuple[float, float, float] | None:
        """In signed lines: the nearer of the last two, how far it may be there, and where it had settled.

        None where both are where it has settled, or lie nearer to the reference than that.
        """
        if not self.settled or not all(map(math.isfinite, self._course)):
            return None
        *past, first, last = self._course
        level = median(past)
        room = max(LEAVE, NOISE * pstdev(past, level))
        now = min(first, last, key=lambda v: abs(v - level))
        same = (first - level) * (last - level) > 0
        if same and abs(now - level) > room and min(abs(first), abs(last)) > abs(level):
            return now, level + math.copysign(room, now - level), level
        return None
