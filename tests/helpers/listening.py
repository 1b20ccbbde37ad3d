"""A linear denoiser whose every answer is known, and that remembers what it was asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import Process, bc

F64 = torch.float64


class Listening(nn.Module):
    """x0 = gain x + offset (+ label where the condition is a label), float64.

    `times`, `ends` and `conds` hold the t, s and condition of every call, `graphs` whether a gradient was recorded.
    """

    inputs: tuple[str, ...] = ()

    def __init__(self, process: Process, gain: float = 0.0, offset: float = 0.0, *, takes_s: bool = False) -> None:
        super().__init__()
        self.process, self.takes_s = process, takes_s
        self.gain = nn.Parameter(torch.tensor(gain, dtype=F64))
        self.offset = nn.Parameter(torch.tensor(offset, dtype=F64))
        self.times: list[Tensor] = []
        self.ends: list[Tensor | None] = []
        self.conds: list[Any] = []
        self.graphs: list[bool] = []

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, s: Tensor | None = None, **call: Any) -> Prediction:
        self.times.append(t)
        self.ends.append(s)
        self.conds.append(cond)
        self.graphs.append(torch.is_grad_enabled())
        return from_x0(self.process, x, t, self.answer(x, cond))

    def answer(self, x: Tensor, cond: Any = None) -> Tensor:
        """The x0 that a call gives."""
        label = bc(cond.to(x.dtype), x) if isinstance(cond, Tensor) else 0.0
        return self.gain * x + self.offset + label


class Constant(nn.Module):
    """A discriminator with one logit, the same for every sample."""

    taps: tuple[str, ...] = ()

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return torch.full((len(x), 1), self.logit, dtype=x.dtype)


class Double(Draws):
    """Draws whose noise is float64."""

    def normal(self, *shape: int, dtype: torch.dtype = F64) -> Tensor:
        return super().normal(*shape, dtype=F64)


def batch_of(rows: int = 5, *shape: int, key: int = 3, **fields: Any) -> Batch:
    """A batch in float64 with data; the same key draws the same."""
    shape = shape or (2,)
    data = Double(fold("listening data", key), torch.arange(rows)).normal(*shape)
    return Batch(Double(fold("listening", key), torch.arange(rows)), shape, data, **fields)
