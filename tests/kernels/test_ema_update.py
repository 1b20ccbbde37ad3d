"""The foreach average against its definition."""

import pytest
import torch

from fewstep.kernels import ema_update


def test_the_average_follows_its_closed_form_and_keeps_its_dtype():
    target = [torch.full((3, 2), 2.0, dtype=torch.bfloat16), torch.full((5,), -1.0)]
    average = [torch.zeros(3, 2), torch.ones(5)]
    for _ in range(7):
        ema_update(average, target, 0.75)
    kept = 0.75**7
    assert average[0].dtype == torch.float32
    assert torch.allclose(average[0], torch.full((3, 2), 2.0 * (1 - kept)), rtol=1e-6)
    assert torch.allclose(average[1], torch.full((5,), kept - (1 - kept)), rtol=1e-6)


def test_parameters_are_read_without_a_graph():
    parameter = torch.nn.Parameter(torch.ones(4))
    average = [torch.zeros(4)]
    ema_update(average, [parameter], 0.5)
    assert not average[0].requires_grad
    assert torch.equal(average[0], torch.full((4,), 0.5))
    ema_update([], [], 0.5)


def test_mismatches_are_named_and_change_nothing():
    average = [torch.zeros(2), torch.zeros(3)]
    with pytest.raises(ValueError, match=r"decay: must be in \[0, 1\], got 1.1"):
        ema_update(average, average, 1.1)
    with pytest.raises(ValueError, match="current: 2 tensors expected"):
        ema_update(average, [torch.ones(2)], 0.5)
    with pytest.raises(ValueError, match=r"current\[1\]: expected shape \(3,\)"):
        ema_update(average, [torch.ones(2), torch.ones(4)], 0.5)
    assert not average[0].any()
