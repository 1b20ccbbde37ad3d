"""A student as an adapter: exact where its difference has the rank, the nearest of it otherwise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.algebra.process import Flow
from fewstep.config import UserError
from fewstep.networks.adapters import own_parameters, plain_copy
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.low_rank import extracted, factors
from fewstep.networks.mlp import MLP


def net(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(MLP(2, 16, 2, 0, (), 4), Flow(), "velocity", "angle")


def test_factors_are_the_nearest_of_their_rank():
    torch.manual_seed(1)
    matrix = torch.randn(7, 5)
    s = torch.linalg.svdvals(matrix)
    for rank in (1, 3, 5, 9):
        a, b, kept = factors(matrix, rank)
        assert (a.shape, b.shape) == ((rank, 5), (7, rank))
        lost = float((matrix - b @ a).square().sum())
        assert lost == pytest.approx(float(s[rank:].square().sum()), abs=1e-4)
        assert kept == pytest.approx(float(s[:rank].square().sum()), rel=1e-5)
        torch.testing.assert_close(b.square().sum(0)[:5], a.square().sum(1)[:5], rtol=1e-4, atol=1e-5)


def test_a_difference_of_low_rank_is_the_student_exactly():
    base = net()
    student: Any = copy.deepcopy(base)
    layers = [m for m in student.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for m in layers:
            m.weight += torch.randn(m.out_features, 2) @ torch.randn(2, m.in_features)
    adapted, kept = extracted(base, student, 2)
    assert kept.layers == pytest.approx(1.0, abs=1e-5)
    assert kept.whole == pytest.approx(1.0, abs=1e-5)
    merged = dict(plain_copy(adapted).named_parameters())
    for name, p in student.named_parameters():
        torch.testing.assert_close(merged[name], p, rtol=1e-4, atol=1e-4)
    assert len(own_parameters(adapted)) == 2 * len(layers)


def test_what_has_no_adapter_is_lost_and_counted():
    base = net()
    student: Any = copy.deepcopy(base)
    layer = next(m for m in student.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        layer.weight[0, 0] += 1.0
        layer.bias[0] += 1.0
    _, kept = extracted(base, student, 1)
    assert kept.layers == pytest.approx(1.0, abs=1e-5)
    assert kept.whole == pytest.approx(0.5, abs=1e-5)


def test_networks_that_are_no_student_of_the_base_are_refused():
    with pytest.raises(UserError, match="no layer that an adapter reaches differs"):
        extracted(net(), net(), 2)
    other = Denoiser(MLP(2, 16, 3, 0, (), 4), Flow(), "velocity", "angle")
    with pytest.raises(UserError, match="has other weights than its teacher"):
        extracted(net(), other, 2)
