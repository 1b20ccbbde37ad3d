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
APART = 0.02
"""Distance of samples from the reference beyond the least there was (`samples/distance`), above which they have left."""
ALIKE = 0.85
"""Spread of samples over the most there was, below which they become alike."""
IN_A_ROW = 2
"""Readings that are judged together, by the one that is better."""
REMEDY = "lower method.reward.weight (of pso: optim.student.lr, method.clip), or stop there (train.guard=stop)"
KEYS = ("samples/reward", "samples/distance", "samples/spread")


@dataclass
class Rise:
    """Readings of a stage's samples with a reward, folded one by one."""

    recent: dict[str, deque[float]] = field(default_factory=lambda: {k: deque(maxlen=IN_A_ROW) for k in KEYS})
    nearest: float = math.inf
    """Least distance that readings in a row have not exceeded."""
    widest: float = 0.0
    """Largest spread that readings in a row have not fallen below."""
    start: float = math.inf
    """The reward where samples were nearest."""

    def add(self, record: Mapping[str, Any]) -> None:
        """The next record of the stage; those without these readings say nothing."""
        if not all(isinstance(record.get(key), int | float) for key in KEYS):
            return
        for key in KEYS:
            self.recent[key].append(float(record[key]))
        reward, distance, spread = (self.recent[key] for key in KEYS)
        if len(reward) < IN_A_ROW:
            return
        self.widest = max(self.widest, min(spread))
        if max(distance) < self.nearest:
            self.nearest, self.start = max(distance), min(reward)

    @property
    def known(self) -> bool:
        return math.isfinite(self.nearest)

    def gain(self) -> float:
        """Rise of the reward since samples were nearest to the reference."""
        return min(self.recent["samples/reward"]) - self.start

    def apart(self) -> float:
        """How much farther than that they are."""
        return min(self.recent["samples/distance"]) - self.nearest

    def alike(self) -> float:
        """Their spread over the most there was."""
        return max(self.recent["samples/spread"]) / max(self.widest, 1e-12)

    def worst(self) -> tuple[float, float, str]:
        """The reading that is nearest to its line or farthest beyond it, the line, and all three in words."""
        apart, alike = self.apart(), self.alike()
        text = (
            f"reward is {self.gain():+.2f} of its deviations from where samples were nearest to the reference; since "
            f"then their distance is {apart:+.3f} and their spread {alike:.2f} of its best"
        )
        far = apart / APART > (1 - alike) / (1 - ALIKE)
        return (apart, APART, text) if far else (alike, ALIKE, text)

    def hacked(self) -> bool:
        """Whether the reward has risen at the samples' cost."""
        return self.gain() > GAIN and (self.apart() > APART or self.alike() < ALIKE)
