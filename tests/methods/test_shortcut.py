"""Shortcut models: which share of a batch learns from two jumps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from listening import Listening, batch_of

from fewstep.algebra.process import Flow, ShiftedFlow
from fewstep.methods.shortcut import Shortcut
from fewstep.networks.roles import Roles


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_bootstrap_is_the_share_of_the_two_jumps(share: float):
    roles = Roles(student=Listening(Flow(), 0.3, 0.2, takes_s=True))
    method = Shortcut(bootstrap=share, target_decay=None)
    (losses,) = method.losses(roles, batch_of(1000))
    assert (float(losses["shortcut"].detach()) > 0) == (share > 0)
    assert (float(losses["flow"].detach()) > 0) == (share < 1)
    # The last call is the student's own; flow matching asks it at s = t.
    t, s = roles.student.times[-1], roles.student.ends[-1]
    assert s is not None
    jumps = float((s < t).double().mean())
    assert abs(jumps - share) <= 4 * (share * (1 - share) / 1000) ** 0.5


@pytest.mark.parametrize("process", [Flow(), ShiftedFlow(shift=3.0)])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_jumps_that_samples_take_are_trained(process: Flow, count: int):
    """Even levels are uneven in time where it is shifted: jumps of even length in time train none of those of 8 steps."""
    student = Listening(process, 0.3, 0.2, takes_s=True)
    method = Shortcut(bootstrap=1.0, target_decay=None, finest=16)
    (losses,) = method.losses(Roles(student=student), batch_of(2000))
    assert torch.isfinite(losses["shortcut"])
    assert student.ends[-1] is not None
    trained = {(round(float(t), 6), round(float(s), 6)) for t, s in zip(student.times[-1], student.ends[-1], strict=True)}
    u = torch.linspace(1, 0, count + 1, dtype=torch.float64)
    levels = [round(float(t), 6) for t in process.grid(u)]
    assert set(pairwise(levels)) <= trained
