"""VSD: how often its critic loses the condition."""

from __future__ import annotations

import pytest
import torch
from listening import Listening, batch_of

from fewstep.algebra.process import Flow
from fewstep.methods.vsd import VSD
from fewstep.networks.roles import Roles


@pytest.mark.parametrize(
    ("settings", "share"),
    [({"drop_cond": 1.0}, 1.0), ({"drop_cond": 0.0}, 0.0), ({"drop_cond": 1.0, "guide_critic": False}, 0.0), ({}, 0.1)],
    ids=["all", "none", "unguided", "a tenth"],
)
def test_a_guided_critic_trains_without_its_condition_as_often_as_it_says(settings: dict[str, object], share: float):
    rows = 2000
    roles = Roles(student=Listening(Flow(), 0.3), critic=Listening(Flow(), 0.4), teacher=Listening(Flow(), 0.5))
    method = VSD(**settings)  # type: ignore[arg-type]
    batch = batch_of(rows, cond=torch.full((rows,), 2), null_cond=torch.full((rows,), 7))
    list(method.critic_losses(roles, batch))
    (cond,) = roles.critic.conds
    assert set(cond.tolist()) <= {2, 7}
    lost = float((cond == 7).double().mean())
    assert abs(lost - share) <= 4 * (share * (1 - share) / rows) ** 0.5
    assert (roles.student.conds[0] == 2).all()
