"""The turns of a method listed without a network: which roles are stepped together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewstep.algebra.process import Flow
from fewstep.methods.method import Method
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
    needs = method.needs()
    names = {*needs.roles, "student"} | ({"state"} if needs.state else set())
    roles = Roles(**{name: Anyone() for name in names})
    return [turn.updates for step in (0, 10**9) for turn in method.turns(roles, step)]
