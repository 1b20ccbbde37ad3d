"""Paired metrics: closed forms, and the values of baselines on the digits that were computed apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fewstep.algebra.operators import Blur, Pool
from fewstep.eval.metrics.paired import Paired, consistency, psnr, sharpness, spread
from fewstep.eval.protocol.datasets import digits


def held_out() -> torch.Tensor:
    """The 400 digits of the prototype's split, in [-1, 1]."""
    rows = np.random.default_rng(0).permutation(1797)[1397:]
    return digits()[0][torch.from_numpy(rows)] / 127.5 - 1


def test_psnr_by_its_formula():
    truth = torch.zeros(3, 1, 4, 5)
    x = truth + torch.tensor([0.1, 0.2, 2.0]).reshape(3, 1, 1, 1)
    found = psnr(x, truth)
    wanted = [10 * math.log10(4 / e**2) for e in (0.1, 0.2, 2.0)]
    assert found.value == pytest.approx(sum(wanted) / 3)
    assert psnr(truth, truth).value == pytest.approx(10 * math.log10(4e12))


def test_consistency_is_zero_for_the_truth_and_counts_what_the_operator_sees():
    x = torch.rand(4, 1, 6, 4)
    pairs = Paired(truth=x, given=Pool(factor=2)(x), operator=Pool(factor=2))
    assert consistency(x, pairs).value == 0
    assert consistency(x + 0.25, pairs).value == pytest.approx(0.25, rel=1e-5)
    flipped = x.reshape(4, 1, 3, 2, 2, 2).flip(3).reshape(4, 1, 6, 4)  # within the squares that are pooled
    assert consistency(flipped, pairs).value == pytest.approx(0, abs=1e-6)


def test_spread_is_the_deviation_over_samples_of_one_condition():
    sets = [torch.full((3, 1, 2, 2), v) for v in (0.0, 0.2, 0.4)]
    assert spread(sets).value == pytest.approx(0.2)
    with pytest.raises(ValueError, match="spread: needs two or more samples of each condition"):
        spread(sets[:1])


def test_baselines_of_the_digits_have_their_known_values():
    """controls.md, section 0 and 2: data .953; bilinear of 4 x 4 12.34 dB and .4385; blur twice + noise .2 12.34 dB."""
    x = held_out()
    assert sharpness(x).value == pytest.approx(0.953, abs=5e-4)
    bilinear = F.interpolate(Pool(factor=2)(x), (8, 8), mode="bilinear", align_corners=True)
    assert psnr(bilinear, x).value == pytest.approx(12.34, abs=5e-3)
    assert sharpness(bilinear).value == pytest.approx(0.4385, abs=5e-5)
    noise = 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    blurred = Blur(times=2)(x)
    assert psnr((blurred + noise).clamp(-1, 1), x).value == pytest.approx(12.34, abs=0.02)
