"""Reward hacking: the reward of drawn samples rises while they leave the reference, or become alike."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GAIN = 0.25
"""Rise of the reward since samples were nearest to the reference, in standard deviations of the reference's rewards,
above which it is what pulls them away."""
APART = 1.1
"""`samples/fd` over the least there was, above which samples have left the reference. Most of the reading is the bias of
so few samples: on the digits the line is crossed where FD has risen by a sixth (docs/rewards.md)."""
CHANCE = 5e-4
"""Added to that line, in units of the reading: where there is next to no bias (vectors), little is nothing yet."""
ALIKE = 0.85
"""Spread of samples over the most there was, below which they become alike."""
IN_A_ROW = 2
"""Readings that are judged together, by the one that is better."""
REMEDY = "lower method.reward.weight (of pso: optim.student.lr, method.clip), or stop there (train.guard=stop)"
KEYS = ("samples/reward", "samples/fd", "samples/spread")
"""The last is not there beside a teacher that does not see the condition."""


@dataclass
class Rise:
    """Readings of a stage's samples with a reward, folded one by one."""

    recent: dict[str, deque[float]] = field(default_factory=lambda: {k: deque(maxlen=IN_A_ROW) for k in KEYS})
    nearest: float = math.inf
    """Least Frechet distance that readings in a row have not exceeded."""
    widest: float = 0.0
    """Largest spread that readings in a row have not fallen below."""
    start: float = math.inf
    """The reward where samples were nearest."""

    def add(self, record: Mapping[str, Any]) -> None:
        """The next record of the stage; those without these readings say nothing."""
        there = [key for key in KEYS if isinstance(record.get(key), int | float)]
        if not {*KEYS[:2]} <= {*there}:
            return
        for key in there:
            self.recent[key].append(float(record[key]))
        reward, fd, spread = (self.recent[key] for key in KEYS)
        if len(reward) < IN_A_ROW:
            return
        self.widest = max(self.widest, min(spread, default=0.0))
        if max(fd) < self.nearest:
            self.nearest, self.start = max(fd), min(reward)

    @property
    def known(self) -> bool:
        return math.isfinite(self.nearest)

    def gain(self) -> float:
        """Rise of the reward since samples were nearest to the reference."""
        return min(self.recent["samples/reward"]) - self.start

    def apart(self) -> float:
        """Their Frechet distance over the least there was, without CHANCE."""
        return max(0.0, min(self.recent["samples/fd"]) - CHANCE) / max(self.nearest, 1e-12)

    def alike(self) -> float:
        """Their spread over the most there was, 1 where it is not read."""
        if not self.recent["samples/spread"]:
            return 1.0
        return max(self.recent["samples/spread"]) / max(self.widest, 1e-12)

    def worst(self) -> tuple[float, float, str]:
        """The reading that is nearest to its line or farthest beyond it, the line, and all three in words."""
        apart, alike = self.apart(), self.alike()
        spread = f" and their spread {alike:.2f} of its best" if self.recent["samples/spread"] else ""
        text = (
            f"reward is {self.gain():+.2f} of its deviations from where samples were nearest to the reference; since "
            f"then their FD is {apart:.2f} times its least{spread}"
        )
        far = (apart - 1) / (APART - 1) > (1 - alike) / (1 - ALIKE)
        return (apart, APART, text) if far else (alike, ALIKE, text)

    def hacked(self) -> bool:
        """Whether the reward has risen at the samples' cost."""
        return self.gain() > GAIN and (self.apart() > APART or self.alike() < ALIKE)
