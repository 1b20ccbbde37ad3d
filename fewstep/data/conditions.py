"""Conditions of a data set: classes, or the captions of its samples."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.algebra.draws import Draws
from fewstep.data.text import Text


class ClassConditions:
    """Class numbers int64 (b,), every class alike often; the null class is number `classes`."""

    classes: int

    def conditions(self, draws: Draws) -> Any:
        return draws.integers(self.classes) if self.classes else None

    def null(self, cond: Any) -> Any:
        return None if cond is None else torch.full_like(cond, self.classes)


class TextConditions(ClassConditions):
    """Embedded captions by number where there are any, classes otherwise."""

    text: Text | None

    def conditions(self, draws: Draws) -> Any:
        if self.text is None:
            return super().conditions(draws)
        return self.text.take(draws.integers(len(self.text)))

    def null(self, cond: Any) -> Any:
        return super().null(cond) if self.text is None else self.text.null(cond)
