"""Critic lag is read wherever there is a critic: EMD, the last phase of Phased DMD, VSD with a guided critic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distribution_cases import Affine, Follow, batch64, players, turn_of
from torch import Tensor, nn

from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import Flow
from fewstep.algebra.times import Uniform
from fewstep.methods.emd import EMD
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.methods.vsd import VSD

TIMES = Uniform(low=0.1, high=0.9)
COUNT = 3000
NULL = 7


class Labelled(nn.Module):
    """A critic that is `own` for rows of a class and `other` for the null condition; counts its calls and rows."""

    def __init__(self, own: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.own, self.other, self.process = own, other, own.process
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        self.rows.append(len(x))
        answer: Prediction = self.own(x, t)
        if cond is None:
            return answer
        null: Prediction = self.other(x, t)
        return answer.mix(null, (cond != NULL).to(x.dtype))


def slope(method: Any, lag: float = 1.0) -> tuple[float, list[int]]:
    """The slope that one student update logs, and the rows of the critic's calls.

    The critic's class answers are the optimum of a student `lag` times as wide; its null answers a far one's.
    """
    now = Affine(Flow(), 0.0, 1.2)
    critic = Labelled(Follow(Affine(Flow(), 0.0, 1.2 * lag)), Follow(Affine(Flow(), 3.0, 5.0)))
    roles = players(student=now, critic=critic)
    labels, null = torch.zeros(COUNT, dtype=torch.long), torch.full((COUNT,), NULL)
    batch = batch64(COUNT, cond=labels, null_cond=null)
    (losses,) = turn_of(method.turns(roles, 0), "student").losses(batch)
    return float(losses.log["health/critic_slope"]), critic.rows


CASES: dict[str, tuple[Any, list[int]]] = {
    "emd": (EMD(times=TIMES, langevin=3, step_z=1e-3), 3 * [COUNT]),
    "last phase": (PhasedDMD(times=TIMES, steps=(1.0,), boundaries=()), [COUNT]),
    "guided critic": (VSD(times=TIMES, guidance=4.0), [2 * COUNT]),
    "random guidance": (VSD(times=TIMES, guidance=(0.5, 4.0)), [2 * COUNT]),
    "unguided critic": (VSD(times=TIMES, guidance=4.0, guide_critic=False), [COUNT]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_slope_is_one_for_a_critic_that_follows_and_costs_no_call(name: str):
    method, rows = CASES[name]
    found, seen = slope(method)
    assert abs(found - 1) < 0.05
    assert seen == rows


@pytest.mark.parametrize("name", CASES)
def test_the_slope_tells_the_direction_of_a_lag(name: str):
    method, _ = CASES[name]
    assert slope(method, 0.4)[0] > 1.2
    assert slope(method, 2.5)[0] < 0.95


def test_an_earlier_phase_has_no_slope():
    """Its samples are not clean, so a critic at its optimum does not answer with their mean."""
    roles = players()
    method = PhasedDMD(phase=1)
    (losses,) = turn_of(method.turns(roles, 0), "student").losses(batch64(16))
    assert "health/contrast" in losses.log
    assert "health/critic_slope" not in losses.log
