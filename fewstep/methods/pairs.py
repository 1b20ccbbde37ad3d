"""Noise and sample pairs of the teacher's ODE, made once in a run and kept in its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.guidance import guided
from fewstep.algebra.sampling import Sampler, sample
from fewstep.data.base import Data
from fewstep.networks.roles import Roles

Source = Callable[["Pairs", nn.Module, Sampler, float, Callable[[], None]], None]
"""Fills (pairs, teacher, sampler, guidance, make): from what it keeps, or by calling `make` and keeping that."""


class Pairs(nn.Module):
    """A bank of `count` pairs (noise, teacher's sample, condition). Only samples and conditions take memory.

    The noise of pair k is a pure function of k. Conditions are one tensor or None. `source`, where it is set, is asked
    before the teacher is.
    """

    x0: Tensor
    filled: Tensor
    cond: Tensor | None
    null: Tensor | None
    source: Source | None = None

    def __init__(self, count: int, data: Data) -> None:
        super().__init__()
        self.shape = tuple(data.shape)
        self.register_buffer("x0", torch.zeros(count, *self.shape))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        cond = data.conditions(self._draws(torch.arange(count)))
        if cond is not None and not isinstance(cond, Tensor):
            raise ValueError("a bank of pairs needs conditions of one tensor, such as classes")
        self.register_buffer("cond", cond)
        self.register_buffer("null", data.null(cond))

    @staticmethod
    def _draws(index: Tensor) -> Draws:
        return Draws(fold("pairs"), index)

    def noise(self, index: Tensor) -> Tensor:
        """The start noise float32 of pairs `index` (b,)."""
        return Draws(fold("pairs", "noise"), index).normal(*self.shape)

    def fill(self, roles: Roles, sampler: Sampler, guidance: float = 1.0, batch: int = 256) -> None:
        """Solve the teacher's ODE for the pairs that are still missing."""
        if int(self.filled) == len(self.x0):
            return
        make = partial(self._solve, roles, sampler, guidance, batch)
        if self.source is None:
            make()
        else:
            self.source(self, roles.teacher, sampler, guidance, make)

    @torch.no_grad()
    def _solve(self, roles: Roles, sampler: Sampler, guidance: float, batch: int) -> None:

        class Teacher(nn.Module):
            process = roles.teacher.process
            null: Any = None

            def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Any:
                return guided(roles.teacher, x, t, cond, self.null, guidance)

        teacher = Teacher()
        for first in range(int(self.filled), len(self.x0), batch):
            index = torch.arange(first, min(first + batch, len(self.x0)), device=self.x0.device)
            cond = None if self.cond is None else self.cond[index]
            teacher.null = None if self.null is None else self.null[index]
            self.x0[index] = sample(sampler, teacher, self.noise(index), cond).to(self.x0.dtype)
            self.filled.fill_(int(index[-1]) + 1)

    def draw(self, draws: Draws) -> tuple[Tensor, Tensor, Any]:
        """(noise, sample, condition) of random pairs for the rows of a batch."""
        index = draws.integers(len(self.x0))
        return self.noise(index), self.x0[index], None if self.cond is None else self.cond[index]
