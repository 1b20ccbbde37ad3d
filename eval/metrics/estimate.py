"""A number with its standard error."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A value with its sampling error (one sigma)."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.5g} ± {self.standard_error:.2g}"
