"""A trained network is told from one that its folder misreads; of untrained weights nothing is said."""

from __future__ import annotations

import pytest
import torch

from fewstep.algebra.process import EDM, DiscreteVP
from fewstep.commands.denoising import GOOD, denoising, left_over, readings, shown
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.diffusers import load_denoiser

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def digits() -> Denoiser:
    return load_denoiser("assets:digits-teacher", 10)


def test_the_shipped_teacher_as_it_was_trained(digits: Denoiser):
    said, ok = denoising(digits, torch.zeros(2, *SHAPE))
    assert ok is True
    assert 0.3 < left_over(digits, SHAPE) < 0.5
    assert said.startswith("of its own samples at noise 0.1 it leaves 0.")


MISREAD = [
    (EDM(sigma_data=1.0), "cm", "250log_sigma"),
    (EDM(), "edm", "log_sigma/4"),
    (DiscreteVP(), "eps", "index"),
    (DiscreteVP(), "v", "index"),
]


@pytest.mark.parametrize(("process", "kind", "time"), MISREAD)
def test_it_is_told_how_a_misread_teacher_was_trained(digits: Denoiser, process: EDM, kind: str, time: str):
    other = Denoiser(digits.net, process, kind, time).eval()  # type: ignore[arg-type]
    said, ok = denoising(other, torch.zeros(2, *SHAPE))
    assert ok is False
    assert "when it is read as prediction cm on EDM, sigma_data 0.5, time 250log_sigma: it was trained so" in said


@pytest.mark.parametrize("scale", [0.02, 0.1])
def test_of_random_weights_nothing_is_said(digits: Denoiser, scale: float):
    import copy

    net = copy.deepcopy(digits)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g))
    said, ok = denoising(net, torch.zeros(2, *SHAPE))
    assert ok is None
    assert "weights that are not trained" in said
    assert left_over(net, SHAPE) > GOOD


def test_every_reading_is_another_one(digits: Denoiser):
    others = [shown(o) for o in readings(digits)]
    assert len(set(others)) == len(others) == 6
    assert shown(digits) not in others
    assert shown(digits) == "prediction cm on EDM, sigma_data 0.5, time 250log_sigma"
