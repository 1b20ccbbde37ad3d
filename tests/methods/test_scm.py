"""sCM: its learned weighting."""

from __future__ import annotations

import math

import pytest
import torch
from listening import F64, batch_of
from torch import Tensor, nn

from fewstep.algebra.process import Trig
from fewstep.methods.scm import SCM
from fewstep.networks.analytic import gaussian
from fewstep.networks.roles import Roles


class Level(nn.Module):
    """One level for all times."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, t: Tensor) -> Tensor:
        return self.value.expand(len(t))


def test_the_learned_level_is_at_rest_at_the_log_of_the_error():
    roles, method = Roles(student=gaussian(Trig(), 0.2, 0.9), weighting=Level()), SCM(source="data", warmup=1)

    def loss(level: float) -> tuple[float, float]:
        roles.weighting.value.data.fill_(level)
        (losses,) = method.losses(roles, batch_of(6, 1), 5)
        (slope,) = torch.autograd.grad(losses["scm"], roles.weighting.value)
        return float(losses["scm"].detach()), float(slope)

    error, slope = loss(0.0)
    assert error > 1e-3
    assert slope == pytest.approx(1 - error, rel=1e-10)
    value, slope = loss(0.7)
    assert value == pytest.approx(math.exp(-0.7) * error + 0.7, rel=1e-10)
    assert slope == pytest.approx(1 - math.exp(-0.7) * error, rel=1e-10)
    assert loss(math.log(error))[1] == pytest.approx(0, abs=1e-10)
