"""Uni-Instruct: the divergence's weight and alpha at a known ratio."""

from __future__ import annotations

import math

import pytest
import torch
from listening import F64, Constant, Listening, batch_of

from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import EDM
from fewstep.methods.uni_instruct import UniInstruct
from fewstep.networks.roles import Roles
from fewstep.objectives.divergence import Expanded


@pytest.mark.parametrize(
    ("divergence", "alpha", "weight"),
    [("rkl", 0.5, 1.0), ("fkl", 1.0, 2.0), ("chi2", 0.0, 1.0), ("js", 2 / 3, 2 / 3), ("jeffreys", 5 / 6, 3.0)],
)
def test_the_ratio_is_fake_over_real(divergence: Expanded, alpha: float, weight: float):
    # A logit of ln 2 says p_fake / p_real = 1/2.
    edm = EDM()
    roles = Roles(
        teacher=Listening(edm, 0.5, 0.2),
        critic=Listening(edm, 0.4, -0.3),
        student=Listening(edm),
        discriminator=Constant(math.log(2)),
    )
    x = torch.linspace(-1, 1, 8, dtype=F64).reshape(4, 2)
    method = UniInstruct(divergence=divergence, normalize=False)
    found = method.loss(roles, batch_of(4), x)["match"]
    again = batch_of(4)
    tau = method.times.sample(again.draws, edm)
    x_tau, _ = add_noise(edm, x, again.noise(), tau)
    real, fake = roles.teacher.answer(x_tau), roles.critic.answer(x_tau)
    wanted = weight * ((real - fake) * (real - x) - alpha * (real - fake) ** 2).mean()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)
