"""Consistency models: the weight of a pair."""

from __future__ import annotations

import pytest
from listening import Listening, batch_of

from fewstep.algebra.pairings import ECTPairs
from fewstep.algebra.process import EDM
from fewstep.methods.consistency import Consistency
from fewstep.networks.roles import Roles


@pytest.mark.parametrize("key", [1, 2, 3])
def test_the_weight_gap_divides_by_the_step(key: int):
    roles, pairing = Roles(student=Listening(EDM(), 0.3, 0.2)), ECTPairs()
    process = roles.student.process
    t, u = pairing.sample(batch_of(1, key=key).draws, process, 0)

    def loss(weight: str) -> float:
        method = Consistency(source="data", pairing=pairing, weight=weight)  # type: ignore[arg-type]
        (losses,) = method.losses(roles, batch_of(1, key=key), 0)
        return float(losses["consistency"].detach())

    assert loss("gap") / loss("one") == pytest.approx(1 / float(t - u), rel=1e-10)
    # The pair is that of one data and one noise: .3 (x_t - x_u) = .3 (t - u) eps apart, where u is above the end.
    if float(u) > 0:
        again = batch_of(1, key=key)
        pairing.sample(again.draws, process, 0)
        wanted = (0.3 * (t - u) * again.noise()).square().mean()
        assert loss("one") == pytest.approx(float(wanted), rel=1e-10)
