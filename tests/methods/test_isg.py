"""Intra-segment guidance: the loss by hand, its ends, and what it adds to a method beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from listening import F64, Listening, batch_of

from fewstep.algebra.process import EDM, Flow
from fewstep.algebra.rollout import rollout
from fewstep.methods.isg import ISG
from fewstep.networks.roles import Roles

FLOW = Flow()


def cast() -> Roles:
    return Roles(teacher=Listening(FLOW, 0.5, 0.2), student=Listening(FLOW, 0.3, -0.1))


@pytest.mark.parametrize("key", range(4))
@pytest.mark.parametrize("path", ["renoise", "map"])
def test_the_loss_is_the_distance_of_two_landings_at_the_next_level(key: int, path: Any) -> None:
    steps, method = (1.0, 0.7, 0.4), ISG(steps=(1.0, 0.7, 0.4), distance="mse", margin=0.1, path=path)
    roles = cast()
    (losses,) = method.losses(roles, batch_of(4, key=key))
    again = batch_of(4, key=key)
    i = again.draws.shared_integer(3)
    x = rollout(roles.student, again.draws, (2,), steps, exit=i, path=path).x_in
    t, s = steps[i], (*steps, 0.0)[i + 1]
    middle = (s + (t - s) * (0.1 + 0.8 * again.draws.uniform()))[:, None]
    there = x + (middle - t) * (x - (0.5 * x + 0.2)) / t
    target = there + (s - middle) * (there - (0.3 * there - 0.1)) / middle
    landed = x + (s - t) * (x - (0.3 * x - 0.1)) / t
    assert float(losses["guide"].detach()) == pytest.approx(float(((landed - target) ** 2).mean().detach()), rel=1e-12)
    # Only the student's one jump carries a gradient; the level between keeps off both ends.
    losses["guide"].backward()
    assert roles.teacher.gain.grad is None
    mean = (2 * (landed - target) * (t - s) / t).mean()
    assert float(roles.student.offset.grad) == pytest.approx(float(mean.detach()), rel=1e-12)
    assert bool(((middle > s + 0.099 * (t - s)) & (middle < t - 0.099 * (t - s))).all())


@pytest.mark.parametrize("process", [Flow(), EDM()])
def test_a_constant_answer_that_the_teacher_shares_is_at_rest(process: Any) -> None:
    # Its path is straight, so that every way from t to s ends in one place.
    roles = Roles(**{name: Listening(process, 0.0, 0.3) for name in ("teacher", "student")})
    for key in range(3):
        (losses,) = ISG().losses(roles, batch_of(5, key=key))
        assert float(losses["guide"].detach()) < 1e-12


def test_a_range_of_scales_is_drawn_for_each_sample() -> None:
    roles = cast()
    labels = {"cond": torch.arange(1, 6), "null_cond": torch.zeros(5, dtype=torch.long)}
    one, other = (ISG(steps=(1.0, 0.5), guidance=w) for w in (2.0, (2.0, 4.0)))
    a, b = (float(next(m.losses(roles, batch_of(5, **labels)))["guide"].detach()) for m in (one, other))
    assert abs(a - b) > 1e-6
    with pytest.raises(ValueError, match="low, high"):
        ISG(guidance=(4.0, 2.0))
    assert roles.student.times[0].dtype == F64
