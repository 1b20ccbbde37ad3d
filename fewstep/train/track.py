"""The course of one reading of drawn samples: the last two, the nearest that it has been, and where it has settled."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from fewstep.train.lines import Reading

RECENT = 2
"""Readings of samples in a row that are judged together, by the one that is nearer to the reference."""
SETTLED = 10
"""Readings before these that tell where a reading has settled. Twenty, and fewer deviations, have more false alarms where
readings are correlated: they hold what was before."""
GAP = 3
"""Readings between them and the last two: they may belong to what is looked for."""
LEAVE = 0.25
"""By how much of its line a settled reading may move away. Of digits-dmd2 it moves by 0.2 (samples/offset 0.08)."""
NOISE = 4.0
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
        self._course = deque[float](maxlen=SETTLED + GAP + RECENT)

    def add(self, value: float, course: Any = None) -> None:
        """The next value; course: that of the reading whose course is followed, None in a log without it."""
        self.recent.append(value)
        self.count += 1
        self.best = min(self.best, max(map(self.reading.badness, self.recent)))
        if isinstance(course, int | float):
            self._course.append(float(course))
        else:
            self._course.clear()

    @property
    def settled(self) -> bool:
        """There are readings enough before the last ones."""
        return self.count >= SETTLED + RECENT

    def _followed(self) -> list[float]:
        """How far from the reference the course has been; empty where it is too short or holds what is no number."""
        whole = len(self._course) == self._course.maxlen and all(map(math.isfinite, self._course))
        return [self.reading.badness(v) for v in self._course] if whole else []

    def left(self) -> tuple[float, float, float] | None:
        """The nearer of the last two, how far it may be from the reference, and how far it was, all in its unit.

        None where no other reading's course is followed, where either of the last two is 0 but for chance, and where
        they are no farther from the reference, on whichever side, than it has settled.
        """
        if not (past := self._followed()) or any(self.reading.badness(v) == 0 for v in self.recent):
            return None
        first, last = past[-RECENT:]
        level, noise = settled_at(past[:SETTLED])
        limit = level + max(LEAVE, NOISE * noise)
        before, side = (math.copysign(1, v - self.reading.centre) for v in list(self._course)[-RECENT:])
        if before != side or min(first, last) <= limit:
            return None
        return self.reading.at(side * min(first, last)), self.reading.at(side * limit), abs(self.reading.at(level))

    def nearer(self) -> bool:
        """The last two are nearer to the reference than it had settled, by half of what it may move away."""
        if not (past := self._followed()):
            return False
        return max(past[-RECENT:]) < settled_at(past[:SETTLED])[0] - LEAVE / 2


def settled_at(values: list[float]) -> tuple[float, float]:
    """The median and the root mean square distance from it. `statistics` computes in fractions: half a millisecond."""
    ordered = sorted(values)
    level = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return level, math.sqrt(math.fsum((v - level) ** 2 for v in values) / len(values))
