"""IMM: its kernel and its weight in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.algebra.process import Flow
from fewstep.methods.imm import IMM, mmd2

F64 = torch.float64


def test_the_laplace_kernel_has_the_dimension_in_its_width():
    x, y = torch.tensor([[[0.0, 0.0]]], dtype=F64), torch.tensor([[[3.0, 4.0]]], dtype=F64)
    for scale in (1.0, 0.3):
        found = mmd2(x, y, "laplace", torch.tensor([scale], dtype=F64))
        # A sample is 1e-8 from itself.
        wanted = 2 * math.exp(-scale * 1e-8 / 2) - 2 * math.exp(-scale * 5 / 2)
        assert float(found) == pytest.approx(wanted, rel=1e-12)
    assert float(mmd2(x, y, "l2", torch.ones(1, dtype=F64))) == pytest.approx(50)


@pytest.mark.parametrize("t", [0.25, 0.8])
@pytest.mark.parametrize(("a", "b"), [(1, 5.0), (2, 4.0)])
def test_the_weight_is_the_papers(a: int, b: float, t: float):
    found = IMM(a=a, b=b).weights(Flow(), torch.tensor([t], dtype=F64))
    # lambda = 2 ln((1 - t) / t), so -dlambda/dt = 2 / (t (1 - t)).
    snr = 2 * math.log((1 - t) / t)
    wanted = 0.5 / (1 + math.exp(snr - b)) * 2 / (t * (1 - t)) * (1 - t) ** a / ((1 - t) ** 2 + t**2)
    assert float(found) == pytest.approx(wanted, rel=1e-12)
    if (a, t) == (1, 0.25):
        assert float(found) == pytest.approx(6.034083958873696, rel=1e-12)
