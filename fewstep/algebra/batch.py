"""One micro-batch: samples that know their global index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewstep.algebra.draws import Draws


@dataclass
class Batch:
    """One micro-batch: b samples that know their global index through `draws`.

    x0 (b, *shape) in [-1, 1] or None; cond and null_cond of one structure (a tensor or a mapping) or None; step, the
    number of steps of the stage that were done before.

    >>> batch = fewstep.Batch(fewstep.Draws(fewstep.fold("batch"), torch.arange(4)), shape=(2,))
    >>> len(batch), batch.noise().shape
    (4, torch.Size([4, 2]))
    """

    draws: Draws
    shape: tuple[int, ...]
    x0: Tensor | None = None
    cond: Any = None
    null_cond: Any = None
    step: int = 0

    def __len__(self) -> int:
        return len(self.draws)

    def noise(self) -> Tensor:
        """Fresh standard normal noise (b, *shape)."""
        return self.draws.normal(*self.shape)

    def data(self) -> Tensor:
        """x0, or an error: the method said it needs no data and then asked for it."""
        if self.x0 is None:
            raise ValueError("this batch has no data: the method's needs() must say data=True")
        return self.x0
