"""A number and how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its sampling error; a Frechet distance knows more of itself than that.

    Attributes:
        value: the number, as every other package computes it.
        standard_error: one sigma over draws of the samples, everything else fixed; None or NaN where unknown.
        n: samples behind `value`; None where unknown or not told.
        dim: feature dimension of a Frechet distance.
        bias: expected excess b/n of a Frechet distance over its limit for n -> infinity.
        usable: whether `corrected` may be quoted: b/n <= value - b/n.
        reason: why it may not; empty when it may.
        influence: (n,) influence of each sample on `value`; two estimates on shared seeds subtract.
        curvature: second-order influence of fixed pairs of samples; subtracts likewise.
    """

    value: float
    standard_error: float | None = None
    n: int | None = None
    dim: int | None = None
    bias: float | None = None
    usable: bool = False
    reason: str = ""
    influence: np.ndarray | None = field(default=None, repr=False, compare=False)
    curvature: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def corrected(self) -> float | None:
        """value - b/n, or None; quote it only when `usable`."""
        return None if self.bias is None else self.value - self.bias

    def __str__(self) -> str:
        text = f"{self.value:.6g}"
        if self.standard_error is not None and not math.isnan(self.standard_error):
            text += f" ± {self.standard_error:.2g}"
        if self.dim is None:
            return text
        text += f" (N={'unknown' if self.n is None else self.n}"
        if self.bias is not None:
            text += f", b/N={self.bias:.3g}"
            if self.usable:
                text += f", corrected {self.corrected:.6g}"
        if not self.usable and self.reason.startswith("N too small"):
            text += ", N too small for a corrected value: see KID or CMMD"
        return text + ")"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without the per-sample influence; `corrected` is null unless usable."""
        content: dict[str, Any] = {"value": self.value, "standard_error": self.standard_error}
        if self.dim is None:
            return content
        return content | {
            "n": self.n,
            "dim": self.dim,
            "bias": self.bias,
            "corrected": self.corrected if self.usable else None,
            "usable": self.usable,
            "reason": self.reason,
        }
