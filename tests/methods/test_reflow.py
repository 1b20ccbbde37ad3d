"""SlimFlow's guide: a straight flow leaves a perfect student at rest, a curved one does not."""

from __future__ import annotations

from typing import Any

import torch
from trajectory_helpers import F64, Batch64

from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import Flow, bc
from fewstep.methods.reflow import Reflow
from fewstep.networks.analytic import gaussian
from fewstep.networks.roles import Roles

STD = 0.4


class Line(torch.nn.Module):
    """The straight flow z -> w z: at x = (1 - t) w z + t z its x0 is w z."""

    def __init__(self) -> None:
        super().__init__()
        self.process, self.weight = Flow(), torch.nn.Parameter(torch.tensor(STD, dtype=F64))

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None, **call: Any) -> Prediction:
        return from_x0(self.process, x, t, self.weight * x / bc((1 - t) * STD + t, x))


def gradient(guide: str) -> float:
    """Of the loss at the weight of a student that is the teacher's one-step map N(0, 1) -> N(0, STD^2)."""
    student = Line()
    roles = Roles(teacher=gaussian(Flow(), 0.0, STD, 2), student=student, straight=Line().requires_grad_(False))
    method = Reflow(mode="distill", guide_weight=1.0, guide=guide, teacher_steps=64)  # type: ignore[arg-type]
    losses = next(iter(method.losses(roles, Batch64.of(400, 2), 0)))
    losses["guide"].backward()
    return abs(float(student.weight.grad))  # type: ignore[arg-type]


def test_a_straight_guide_rests_and_a_curved_one_draws_together() -> None:
    assert gradient("straight") < 1e-12
    assert gradient("teacher") > 1e-2
    assert Reflow(guide_weight=0.3).needs().frozen == {"teacher", "straight"}
    assert Reflow(guide_weight=0.3, guide="teacher").needs().roles == {"teacher", "student"}
