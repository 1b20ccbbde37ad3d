"""f-distill: which way round the ratio is, how it is limited, and the average of its bins."""

from __future__ import annotations

import math

import pytest
import torch
from listening import F64, Constant, Listening

from fewstep.algebra.process import Flow
from fewstep.methods.f_distill import FDistill, RatioBins
from fewstep.networks.roles import Roles
from fewstep.objectives.divergence import Divergence

X, T = torch.zeros(3, 2, dtype=F64), torch.tensor([0.1, 0.5, 0.9], dtype=F64)


def weights(logit: float, divergence: Divergence = "fkl", bins: int = 0, **settings: object) -> list[float]:
    method = FDistill(divergence=divergence, bins=bins, normalize=False, **settings)  # type: ignore[arg-type]
    roles = Roles(student=Listening(Flow()), discriminator=Constant(logit)).with_state(RatioBins(bins) if bins else None)
    return method.weight(roles, X, T, None).tolist()


def test_the_ratio_is_real_over_fake_and_limited():
    # The optimal logit is ln(p_real / p_fake).
    assert weights(math.log(2)) == pytest.approx([2.0] * 3)
    assert weights(math.log(2), "softened_rkl") == pytest.approx([1 / 3] * 3)
    assert weights(-5.0) == pytest.approx([0.1] * 3)
    assert weights(5.0) == pytest.approx([20.0] * 3)
    assert weights(5.0, logit_clip=1.0) == pytest.approx([math.e] * 3)
    # A ratio that is the same everywhere says nothing once its bins' means are divided out.
    assert weights(math.log(2), bins=10) == pytest.approx([1.0] * 3)


def test_bins_keep_the_share_of_their_decay():
    bins = RatioBins(3)
    ratio, place = torch.tensor([3.0, 5.0, 8.0], dtype=F64), torch.tensor([0, 0, 2])
    found = bins.normalize(ratio, place, 0.75)
    # Bins start at 1: .75 + .25 * 4 and .75 + .25 * 8; one without samples stays.
    assert bins.mean.tolist() == [1.75, 1.0, 2.75]
    assert found.tolist() == pytest.approx([3 / 1.75, 5 / 1.75, 8 / 2.75])
    bins.normalize(ratio, place, 0.0)
    assert bins.mean.tolist() == [4.0, 1.0, 8.0]
