"""Consistency students are the identity at the clean end by their parametrisation, whatever their weights are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from trajectory_helpers import F64

from fewstep.algebra.jump import ask, clean
from fewstep.algebra.process import EDM, VP, Flow, Process, Trig
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.dit import DiT

SHAPE = (2, 4, 6)
IDENTICAL = [
    (Flow(), "velocity"),
    (Flow(), "psi"),
    (VP(), "v"),
    (VP(), "eps"),
    (Trig(), "trig"),
    (Trig(), "velocity"),
    (EDM(sigma_min=0.0), "edm"),
    (EDM(), "cm"),
    (EDM(sigma_min=0.3), "cm"),
]


def student(process: Process, prediction: str) -> Denoiser:
    torch.manual_seed(11)
    net = Denoiser(DiT(SHAPE, 2, 16, 2, 2), process, prediction, "angle")
    for p in net.parameters():
        # The last layer starts at zero, where some students are the identity everywhere.
        p.data.normal_(0, 0.3)
    return net


def answers(net: Denoiser, level: float) -> tuple[Tensor, Tensor]:
    """(x, x0) of the student's forward at a level, three rows of values up to some tens."""
    x = 20 * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(4))
    t = net.process.grid(torch.full((3,), level, dtype=F64))
    return x, ask(net, x, t, clean(net.process, t)).x0.detach()


@pytest.mark.parametrize(
    ("process", "prediction"), IDENTICAL, ids=lambda v: v if isinstance(v, str) else type(v).__name__
)
def test_students_answer_x_at_the_clean_end(process: Process, prediction: str) -> None:
    net = student(process, prediction)
    x, x0 = answers(net, 0.0)
    assert torch.equal(x0, x)
    x, x0 = answers(net, 0.3)
    assert bool((x0 - x).abs().flatten(1).max(1).values.min() > 1e-2)


def test_edm_scalings_are_not_the_identity_at_sigma_min_and_x0_nowhere() -> None:
    # Why CM moves the boundary: c_skip = 1, c_out = 0 only at sigma = 0, which a Karras grid does not reach.
    x, x0 = answers(student(EDM(sigma_min=0.3), "edm"), 0.0)
    assert float((x0 - x).abs().max()) > 1e-2
    x, x0 = answers(student(Flow(), "x0"), 0.0)
    assert float((x0 - x).abs().max()) > 1e-2
