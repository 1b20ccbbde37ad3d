"""The control as a reward: its slope, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fewstep.algebra.operators import Blur, Pool, Silhouette
from fewstep.config import RecipeError
from fewstep.networks.control import Control, ControlSpec
from fewstep.networks.parts import Site

SITE = Site((1, 6, 4), 0, {}, 0, (1, 3, 2))


def test_its_slope_is_that_of_a_likelihood_over_the_number_of_pixels():
    x = torch.randn(3, 1, 6, 4, dtype=torch.float64, requires_grad=True)
    image = torch.randn(3, 1, 3, 2, dtype=torch.float64)
    reward = Control(Pool(factor=2), 0.3)(x, {"image": image})
    assert reward.shape == (3,)
    (slope,) = torch.autograd.grad(reward.sum(), x)
    gap = (Pool(factor=2)(x) - image).repeat_interleave(2, 2).repeat_interleave(2, 3) / 4  # A^T of a mean of four
    assert torch.allclose(slope, -gap / 0.3**2 / 6)
    assert float(Control(Pool(factor=2), 0.3)(x, {"image": Pool(factor=2)(x)}).abs().max()) == 0


def test_a_control_of_other_pictures_than_the_datas_is_refused():
    assert isinstance(ControlSpec(by=Pool(factor=2)).build(SITE), Control)
    with pytest.raises(RecipeError, match=r"control.by: blur makes pictures of \[1, 6, 4\], .* hold one of \[1, 3, 2\]"):
        ControlSpec(by=Blur()).build(SITE)
    with pytest.raises(RecipeError, match="conditions hold no picture"):
        ControlSpec(by=Pool()).build(Site((1, 6, 4), 0, {}, 0))
    with pytest.raises(RecipeError, match=r"control.by: pool.factor: 5 does not divide"):
        ControlSpec(by=Pool(factor=5)).build(SITE)
    assert not ControlSpec(by=Silhouette(softness=0.0)).differentiable
    assert ControlSpec(by=Silhouette()).differentiable
