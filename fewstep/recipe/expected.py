"""What a recipe's runs are expected to look like: bands of losses and readings, made by `fewstep recipes expect`."""

from __future__ import annotations

import math

from fewstep.config import config


@config
class Band:
    """A reading's range in each part of the last stage."""

    low: tuple[float, ...]
    """Lower ends, one a part."""
    high: tuple[float, ...]
    """Upper ends, one a part."""

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high):
            raise ValueError(f"low has {len(self.low)} parts, high {len(self.high)}")
        if not all(math.isfinite(a) and math.isfinite(b) and a <= b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError("low must not be above high, and both be finite")


@config
class Expected:
    """Bands from reference runs, and what they are of."""

    runs: int
    """Reference runs."""
    batch: int
    """Their train.batch."""
    teacher: str
    """Digest of their teacher's files; empty where it has none."""
    data: str
    """Digest of their data's files; empty where it has none."""
    recipe: str
    """Digest of the settings that readings depend on; paths, seed, number of updates and what is logged are none."""
    ends: tuple[int, ...]
    """Update of the last stage at which each part ends."""
    bands: dict[str, Band]
    """By the reading's name in log.jsonl."""

    def __post_init__(self) -> None:
        if list(self.ends) != sorted(set(self.ends)) or not self.ends or self.ends[0] < 1:
            raise ValueError(f"ends must increase from 1 on, not {list(self.ends)}")
        for name, band in self.bands.items():
            if len(band.low) != len(self.ends):
                raise ValueError(f"bands: {name} has {len(band.low)} parts, ends {len(self.ends)}")
