"""The turns of a method listed without a network: which roles are stepped together, and how often in a step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from fewstep.algebra.process import Flow
from fewstep.methods.method import Method, Turn
from fewstep.networks.roles import Roles


class Anyone(nn.Module):
    """A role that stands in while the turns of a method are listed; none of their losses is computed."""

    process, inputs, takes_s = Flow(), ("s", "w", "mirror"), True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def fill(self, *_: Any) -> None:
        """A state that a method fills at the start of its turns (the stored pairs of DMD) stays empty."""


def turns_of(method: Method) -> list[tuple[str, ...]]:
    """The roles that each turn of a method steps, listed at the first update and late in a run."""
    return [turn.updates for step in (0, 10**9) for turn in _listed(method, step)]


def updates_a_step(method: Method, steps: int) -> dict[tuple[str, ...], int]:
    """Optimiser steps of each set of roles in one step of a stage of `steps`: all its turns, each as often as it says.

    Where the stage's first and last step differ (turns that begin late), the larger number.
    """
    found: dict[tuple[str, ...], int] = {}
    for step in (0, steps - 1):
        here: Counter[tuple[str, ...]] = Counter()
        for turn in _listed(method, step):
            here[turn.updates] += turn.times
        found |= {updates: max(count, found.get(updates, 0)) for updates, count in here.items()}
    return found


def _listed(method: Method, step: int) -> list[Turn]:
    needs = method.needs()
    names = {*needs.roles, "student"} | ({"state"} if needs.state else set())
    return list(method.turns(Roles(**{name: Anyone() for name in names}), step))
