"""At the optimum (student = teacher, critic and discriminator exact) no method moves the student."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from distribution_cases import MEAN, STD, batch64, players, student_gradient

from fewstep.algebra.times import Uniform
from fewstep.methods.class_ratio import ClassRatio
from fewstep.methods.decoupled_dmd import DecoupledDMD
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.emd import EMD
from fewstep.methods.f_distill import FDistill, RatioBins
from fewstep.methods.gan import Gan
from fewstep.methods.gdd import GDD
from fewstep.methods.joint import Joint, Share
from fewstep.methods.ladd import LADD
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.methods.sid import SiD
from fewstep.methods.uni_instruct import UniInstruct
from fewstep.methods.vsd import VSD

T = Uniform()

METHODS: dict[str, Any] = {
    "dmd2": DMD2(),
    "vsd-sigma2": VSD(),
    "vsd-kl": VSD(weight="kl"),
    "decoupled-coupled": DecoupledDMD(guidance=1.0, schedule="coupled"),
    "decoupled-hybrid": DecoupledDMD(guidance=1.0),
    "phased-one": PhasedDMD(steps=(1.0,), boundaries=()),
    "sid": SiD(times=T, gan=Gan()),
    "sid-half": SiD(times=T, alpha=0.5),
    "sim": SiD(times=T, alpha=1.0, huber=0.03),
    **{f"f-distill-{d}": FDistill(divergence=d) for d in ("rkl", "fkl", "js", "softened_rkl", "hellinger", "neyman")},
    "f-distill-jeffreys": FDistill(divergence="jeffreys"),
    **{f"uni-{d}": UniInstruct(divergence=d, times=T) for d in ("rkl", "fkl", "chi2", "js", "jeffreys")},
    "emd": EMD(step_z=1e-3, cancel_noise=True, langevin=3),
    "gdd": GDD(gan=replace(GDD().gan, r1_weight=0.0)),
    "ladd": LADD(source="rollout", steps=(1.0,), gan=replace(LADD().gan, loss="logistic")),
    "class-ratio": ClassRatio(),
    "joint": Joint(methods=(Share(method=DMD2()), Share(method=SiD(times=T), weight=0.3))),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_at_the_optimum(name: str):
    roles = players()
    if isinstance(METHODS[name], FDistill):
        roles = roles.with_state(RatioBins(10))
    grad = student_gradient(METHODS[name], roles, batch64())
    assert grad.abs().max() < 1e-6
    away = players(mean=0.2, std=0.7)
    if isinstance(METHODS[name], FDistill):
        away = away.with_state(RatioBins(10))
    # The same call does move a student that is elsewhere, so the zero above is not an empty graph.
    assert student_gradient(METHODS[name], away, batch64()).abs().min() > 1e-4


def test_dmd_rests_when_the_pairs_agree_too():
    method = DMD(pairs=37)
    from fewstep.data.toy import Ring
    from fewstep.methods.pairs import Pairs

    data = Ring().open()
    data.shape = (1,)
    bank = Pairs(37, data).double()
    bank.x0.copy_(MEAN + STD * bank.noise(torch.arange(37)).double())
    bank.filled.fill_(37)

    class Noise64(Pairs):
        def noise(self, index: torch.Tensor) -> torch.Tensor:
            return super().noise(index).double()

    bank.__class__ = Noise64
    bank.x0.copy_(MEAN + STD * bank.noise(torch.arange(37)))
    roles = players(state=bank)
    assert student_gradient(method, roles, batch64()).abs().max() < 1e-6
    bank.x0.add_(0.2)
    assert student_gradient(method, roles, batch64()).abs().max() > 1e-3


def test_guidance_augmentation_of_an_unconditional_teacher_vanishes():
    # D_cond = D_null here, so CA is zero whatever w is, and only the DM term is left.
    roles = players(mean=0.1)
    cond = torch.zeros(64, dtype=torch.long)
    strong = batch64(cond=cond, null_cond=cond + 1)
    a = student_gradient(DecoupledDMD(guidance=7.5), roles, strong)
    b = student_gradient(DecoupledDMD(guidance=1.0), roles, batch64(cond=cond, null_cond=cond + 1))
    assert torch.allclose(a, b, atol=1e-12)
