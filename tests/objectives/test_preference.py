"""Losses of pairs: golden numbers, ties, the swap, and the trust region of the clip (arXiv 2410.03190)."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.objectives.preference import log_ratio, offline, offline_hinge, pairwise

F64 = torch.float64
ALPHA = 0.5
STD = torch.tensor([0.5], dtype=F64)


def ratios() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The golden pair: x0 of the student (.8, .5), of the reference (.7, .6), states (.6, .1); x0s and their ratios."""
    win, lose = (torch.tensor([[v]], dtype=F64, requires_grad=True) for v in (0.8, 0.5))
    first = log_ratio(torch.tensor([[0.6]], dtype=F64), ALPHA * win, torch.tensor([[ALPHA * 0.7]], dtype=F64), STD)
    second = log_ratio(torch.tensor([[0.1]], dtype=F64), ALPHA * lose, torch.tensor([[ALPHA * 0.6]], dtype=F64), STD)
    return win, lose, first, second


@pytest.mark.parametrize(
    ("beta", "loss", "slope"),
    [(1.0, 0.6881596805, (-0.1990000083, -0.1492500062)), (50.0, 0.4740769842, (-7.5508133760, -5.6631100320))],
)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_golden_numbers(beta: float, loss: float, slope: tuple[float, float], clip: float | None):
    win, lose, first, second = ratios()
    assert (float(first.detach()), float(second.detach())) == pytest.approx((0.045, 0.035), rel=1e-12)
    value = pairwise(first, second, torch.ones(1, dtype=F64), beta, clip)
    assert float(value.detach()) == pytest.approx(loss, abs=1e-10)
    found = torch.autograd.grad(value, (win, lose))
    assert [float(g) for g in found] == pytest.approx(slope, abs=1e-10)


def test_a_tie_has_no_gradient_and_the_reference_itself_the_loss_log_2():
    win, lose, first, second = ratios()
    tie = pairwise(first, second, torch.zeros(1, dtype=F64), 50.0)
    assert float(tie.detach()) == pytest.approx(math.log(2), rel=1e-15)
    assert all(float(g) == 0 for g in torch.autograd.grad(tie, (win, lose)))
    here = log_ratio(torch.randn(3, 2), torch.ones(3, 2), torch.ones(3, 2), torch.full((3,), 0.4))
    assert (here == 0).all()


def test_the_other_one_being_better_turns_the_gradient():
    win, lose, first, second = ratios()
    one = torch.autograd.grad(pairwise(first, second, torch.ones(1), 1e-9), (win, lose), retain_graph=True)
    other = torch.autograd.grad(pairwise(second, first, torch.ones(1), 1e-9), (win, lose))
    assert [float(a) for a in one] == pytest.approx([-float(b) for b in other])


def test_outside_the_clip_there_is_no_gradient():
    values = torch.tensor([0.2, -0.3, 0.05], dtype=F64, requires_grad=True)
    loss = pairwise(values, torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64), 50.0, 0.1)
    (slope,) = torch.autograd.grad(loss, values)
    assert slope[:2].tolist() == [0.0, 0.0]
    assert float(slope[2]) < 0
    ends = pairwise(values, torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64), 1.0, 0.1).detach()
    held = torch.tensor([math.log(1.1), math.log(0.9), 0.05], dtype=F64)
    assert float(ends) == pytest.approx(float(-torch.nn.functional.logsigmoid(held).mean()), rel=1e-14)


def test_a_log_ratio_is_that_of_two_gaussians_per_element():
    x, a, b = (torch.randn(4, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(k)) for k in range(3))
    std = torch.tensor([0.3, 0.7, 1.0, 2.0], dtype=F64)
    wide = std.reshape(4, 1, 1)
    wanted = torch.distributions.Normal(a, wide).log_prob(x) - torch.distributions.Normal(b, wide).log_prob(x)
    torch.testing.assert_close(log_ratio(x, a, b, std), wanted.mean((1, 2)))


def test_equal_pairs_offline_have_no_gradient_and_the_hinge_ends():
    win = torch.tensor([0.4, 0.7], dtype=F64, requires_grad=True)
    lose = win * 1.0
    loss = offline(win, lose, torch.tensor([0.5, 0.6]), torch.tensor([0.1, 0.2]), beta=5.0)
    assert torch.autograd.grad(loss, win)[0].tolist() == [0.0, 0.0]
    # Less error of the winner than the reference has, or more of the loser: below log 2.
    better = offline(torch.tensor([0.3]), torch.tensor([0.9]), torch.tensor([0.4]), torch.tensor([0.8]), 5.0, 0.1)
    assert float(better) == pytest.approx(math.log1p(math.exp(-5 * (0.1 + 0.1 * 0.1))), rel=1e-6)
    hinge = offline_hinge(torch.tensor([0.1, 3.0]), torch.tensor([9.0, 1.0]), beta=2.0, factor=0.5)
    assert float(hinge) == pytest.approx((0.0 + 1 + 2 * (3.0 - 0.5)) / 2)
