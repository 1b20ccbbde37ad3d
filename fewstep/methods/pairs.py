"""Noise and sample pairs of the teacher's ODE, made once in a run and kept in its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.condition import rows
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.guidance import guided
from fewstep.algebra.sampling import Sampler, sample
from fewstep.data.base import Data
from fewstep.networks.roles import Roles

Source = Callable[["Pairs", nn.Module, Sampler, float, Callable[[], None]], None]
"""Fills (pairs, teacher, sampler, guidance, make): from what it keeps, or by calling `make` and keeping that."""


class Pairs(nn.Module):
    """A bank of `count` pairs (noise, teacher's sample, condition). Only samples and conditions take memory.

    The noise of pair k is a pure function of k. Conditions are one tensor, a mapping or None. `source`, where it is set,
    is asked before the teacher is.
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
        self.keys: tuple[str, ...] = tuple(cond) if isinstance(cond, Mapping) else ()
        for name, value in (("cond", cond), ("null", data.null(cond))):
            held = value if isinstance(value, Mapping) else {}
            self.register_buffer(name, None if self.keys else value)
            for key in self.keys:
                self.register_buffer(f"{name}_{key}", held.get(key))

    def conditions(self, name: str = "cond") -> Any:
        """Those of all pairs, or with "null" their null conditions; None without."""
        if not self.keys:
            return getattr(self, name)
        held = {key: getattr(self, f"{name}_{key}") for key in self.keys}
        return None if any(value is None for value in held.values()) else held

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
            cond = rows(self.conditions(), index)
            teacher.null = rows(self.conditions("null"), index)
            self.x0[index] = sample(sampler, teacher, self.noise(index), cond).to(self.x0.dtype)
            self.filled.fill_(int(index[-1]) + 1)

    def draw(self, draws: Draws) -> tuple[Tensor, Tensor, Any]:
        """(noise, sample, condition) of random pairs for the rows of a batch."""
        index = draws.integers(len(self.x0))
        return self.noise(index), self.x0[index], rows(self.conditions(), index)
