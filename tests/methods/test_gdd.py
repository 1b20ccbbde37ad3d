"""GDD: R1 at its beat and with its weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from listening import Listening, batch_of
from torch import Tensor, nn

from fewstep.algebra.process import Flow
from fewstep.methods.gdd import GDD
from fewstep.networks.roles import Roles


class Quadratic(nn.Module):
    """One logit |x|^2 / 2, whose squared gradient is |x|^2."""

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return 0.5 * x.square().sum(1, keepdim=True)


@pytest.mark.parametrize("every", [16, 5])
def test_r1_is_taken_rarely_and_as_many_times_as_large(every: int):
    roles, method = Roles(student=Listening(Flow(), 0.3), discriminator=Quadratic()), GDD(r1_every=every)

    def r1(step: int) -> Tensor | None:
        turn = list(method.turns(roles, step))[1]
        (losses,) = turn.losses(batch_of(6))
        return losses.get("r1")

    # gamma / 2 = .005 of |grad|^2 on clean data.
    wanted = 0.5 * 0.01 * every * batch_of(6).data().square().sum(1).mean()
    for step in (0, every):
        torch.testing.assert_close(r1(step), wanted, rtol=1e-10, atol=0)
    assert r1(1) is None
    assert r1(every + 1) is None
