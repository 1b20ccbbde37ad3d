"""Cutting fast time features: what is left is slow, the rest is untouched, and training does not bring them back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_teacher import tiny_unet
from torch import nn

from fewstep.config import RecipeError
from fewstep.networks.mlp import MLP
from fewstep.networks.parts import Site
from fewstep.networks.slow_time import slow_time
from fewstep.networks.specs import Copy, MLPSpec


@pytest.mark.parametrize(("shift", "fastest", "cut"), [(0, 0.2, 1), (0, 0.05, 2), (1, 0.05, 1), (1, 1.0, 0)])
def test_only_slow_sinusoids_are_read(shift: int, fastest: float, cut: int) -> None:
    """Frequencies 10^-4i/(4 - shift): the layer's slope in the time is that of the kept ones, in closed form."""
    model: Any = tiny_unet(0, 3, freq_shift=shift)
    others = {n: p.clone() for n, p in model.named_parameters() if "time_embedding.linear_1.weight" not in n}
    first = model.time_embedding.linear_1
    before = first.weight.detach().double().clone()
    assert slow_time(model, fastest) == cut
    frequency = 10.0 ** (-4 * torch.arange(4, dtype=torch.float64) / (4 - shift))
    t = torch.tensor([37.5], dtype=torch.float64)
    # diffusers puts cosines first where flip_sin_to_cos is set, as UNet2DModel has it.
    slope = torch.cat((-frequency * (frequency * t).sin(), frequency * (frequency * t).cos()))
    slope = slope * (frequency <= fastest).repeat(2)
    step = 1e-2
    first.double()
    high, low = (first(model.time_proj(t + h).double()) for h in (step, -step))
    torch.testing.assert_close((high - low)[0] / (2 * step), before @ slope, rtol=0, atol=2e-4)
    assert float((before @ slope).abs().max()) > 1e-3
    for n, p in others.items():
        assert torch.equal(model.get_parameter(n), p), n


def test_training_does_not_bring_them_back() -> None:
    model: Any = tiny_unet(0, 3)
    slow_time(model, 0.2)
    weight = model.time_embedding.linear_1.weight
    kept = weight[:, 1].detach().clone()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.randn(2, 1, 8, 8), torch.tensor([3.0, 500.0])).sample.square().mean().backward()
    adam.step()
    assert not weight[:, [0, 4]].any()
    assert not torch.equal(weight[:, 1], kept)


def test_what_cannot_be_cut_is_said() -> None:
    with pytest.raises(ValueError, match=r"frequency 0\.001"):
        slow_time(tiny_unet(0, 3), 1e-4)
    with pytest.raises(ValueError, match="no sinusoidal time embedding"):
        slow_time(nn.Linear(2, 2), 0.1)
    teacher = MLPSpec(width=8, depth=2).build(Site((2,), 0, {}, 0))
    with pytest.raises(RecipeError, match=r"copy.max_frequency 0.1: the teacher: it has no sinusoidal"):
        Copy(max_frequency=0.1).build(Site((2,), 0, {"teacher": teacher}, 0))


def test_an_mlp_has_as_many_time_features_as_it_is_told() -> None:
    """With one frequency the embedding has period pi in the angle; the default has 16, as saved networks do."""
    net: Any = MLPSpec(width=8, depth=3, inputs=("s",), frequencies=1).build(Site((2,), 0, {}, 0)).net
    assert net.time.linear.in_features == net.extras["s"].linear.in_features == 2
    angle = torch.tensor([0.2])
    torch.testing.assert_close(net.time(angle), net.time(angle + math.pi), rtol=0, atol=1e-5)
    assert (net.time(angle) - net.time(angle + 1)).abs().max() > 1e-2
    assert MLP(2).time.linear.in_features == 32
