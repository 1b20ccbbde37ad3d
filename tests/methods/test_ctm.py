"""CTM: whose leg goes from where to where."""

from __future__ import annotations

import pytest
import torch
from listening import Listening, batch_of

from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import Flow
from fewstep.methods.ctm import CTM
from fewstep.networks.roles import Roles

FLOW = Flow()


@pytest.mark.parametrize("points", [None, 9], ids=["any times", "a grid"])
def test_the_teacher_goes_from_t_to_u_and_the_student_from_u_to_s(points: int | None):
    roles = Roles(teacher=Listening(FLOW, 0.5, 0.2), student=Listening(FLOW, 0.3, -0.1, takes_s=True))
    method = CTM(points=points, teacher_steps=1, solver="ddim", compare="s", denoise_weight=0.0)
    (losses,) = method.losses(roles, batch_of(40))
    again = batch_of(40)
    t, u, s, steps = method.legs(again.draws, FLOW)
    assert bool((s <= u).all() and (u < t).all())
    assert bool((s < u).any())
    x, _ = add_noise(FLOW, again.data(), again.noise(), t)
    asked = list(zip(roles.student.times, roles.student.ends, strict=True))
    assert [(a.tolist(), b.tolist()) for a, b in asked] == [(t.tolist(), s.tolist()), (u.tolist(), s.tolist())]
    assert len(roles.teacher.times) == steps
    assert torch.equal(roles.teacher.times[0], t)
    y, here = x, t
    for k in range(1, steps + 1):
        there = u if k == steps else t + (u - t) * (k / steps)
        y, here = roles.teacher(y, here).at(there), there
    goal = torch.where((s == u)[:, None], y, roles.student(y, u, s=s).at(s))
    wanted = (roles.student(x, t, s=s).at(s) - goal).square().mean()
    assert float(losses["consistency"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)
