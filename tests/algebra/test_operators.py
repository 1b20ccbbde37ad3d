"""Operators: what is left of a picture, whether gradients pass, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fewstep.algebra.operators import Blur, Box, Edges, Grey, Pool, Silhouette

B, C, H, W = 2, 3, 6, 10
SOFT = (Pool(), Blur(), Box(size=2), Edges(), Silhouette(), Grey())


def pictures() -> torch.Tensor:
    return torch.rand(B, C, H, W, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("operator", SOFT, ids=lambda o: o.name)
def test_shapes_are_those_that_were_told_and_gradients_pass(operator):
    x = pictures().requires_grad_()
    found = operator(x)
    assert tuple(found.shape) == (B, *operator.shape((C, H, W)))
    assert operator.differentiable
    found.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0


def test_values_by_hand():
    x = pictures()
    assert torch.allclose(Pool(factor=2)(x)[0, 0, 0, 0], x[0, 0, :2, :2].mean())
    inner = x[0, 0, 1:4, 1:4]
    weight = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=x.dtype) / 16
    assert torch.allclose(Blur(times=1)(x)[0, 0, 2, 2], (weight * inner).sum())
    assert torch.allclose(Blur(times=2)(x), Blur(times=1)(Blur(times=1)(x)))
    boxed = Box(size=2)(x)
    assert not boxed[:, :, 2:4, 4:6].any()
    assert int((boxed != x).sum()) == B * C * 4
    assert torch.allclose(Grey()(torch.ones(1, 3, 2, 2)), torch.ones(1, 1, 2, 2))


def test_edges_stand_where_brightness_jumps_and_flat_pictures_have_a_gradient():
    x = torch.full((1, 1, 5, 8), -1.0, dtype=torch.float64)
    x[..., 4:] = 1.0
    found = Edges(threshold=0.5, softness=0.05)(x)
    assert (found[..., 3:5] > 0.99).all()  # a slope of 1 a pixel on either side
    assert (found[..., :3] < -0.99).all()
    flat = torch.zeros(1, 1, 4, 4, requires_grad=True)
    Edges()(flat).sum().backward()
    assert torch.isfinite(flat.grad).all()


def test_hard_ones_say_that_no_gradient_passes():
    x = pictures()
    for operator in (Silhouette(softness=0.0), Edges(softness=0.0)):
        assert not operator.differentiable
        assert set(operator(x).unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(Silhouette(softness=0.0)(x) > 0, x > 0)


@pytest.mark.parametrize(
    ("operator", "shape", "message"),
    [
        (Pool(factor=4), (1, 8, 6), r"pool.factor: 4 does not divide height and width of the data, \[1, 8, 6\]"),
        (Box(size=6), (1, 8, 6), "box.size: 6 leaves nothing of pictures of 8 x 6"),
        (Grey(), (1, 8, 8), "grey: is for pictures of 3 channels; these have 1"),
        (Blur(), (5,), r"blur: is for pictures \(c, h, w\); these samples are \[5\]"),
    ],
)
def test_pictures_that_an_operator_does_not_take_are_named(operator, shape, message):
    with pytest.raises(ValueError, match=message):
        operator.shape(shape)
