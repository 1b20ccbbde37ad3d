"""Shortcut models: which share of a batch learns from two jumps."""

from __future__ import annotations

import pytest
from listening import Listening, batch_of

from fewstep.algebra.process import Flow
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
