"""The transformer over points: padding, the frame, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewstep.config import RecipeError
from fewstep.networks.dit1d import DiT1DSpec, PointDenoiser
from fewstep.networks.heads import Discriminator
from fewstep.networks.parts import Site

N, D = 7, 3
MASK = torch.tensor([[1.0] * 7, [1.0] * 5 + [0] * 2, [1.0] + [0] * 6, [1.0] * 6 + [0]])


def made(centred: bool = True, n: int = N, classes: int = 0, prediction: str = "velocity") -> PointDenoiser:
    """A net whose zero-initialised layers are not zero."""
    spec = DiT1DSpec(width=16, depth=2, heads=4, centred=centred, prediction=prediction)
    net = spec.build(Site((n, D), classes, {}, 0))
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    assert isinstance(net, PointDenoiser)
    return net


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("prediction", ["velocity", "x0", "eps", "v"])
def test_padding_changes_no_bit_and_gets_none(centred: bool, prediction: str) -> None:
    net, t, cond = made(centred, prediction=prediction), torch.tensor([0.2, 0.9, 0.5, 0.7]), {"points": MASK}
    x = torch.randn(4, N, D, generator=torch.Generator().manual_seed(0))
    spoiled = torch.where(MASK[..., None] > 0, x, 1e6 * torch.randn(4, N, D))
    taps = ("block0", "block1")
    a, b = net(x, t, cond, taps=taps), net(spoiled, t, cond, taps=taps)
    assert torch.equal(a.x0, b.x0)
    assert torch.equal(a.eps, b.eps)
    assert all(torch.equal(a.features[k], b.features[k]) for k in taps)
    assert (a.x0[MASK == 0] == 0).all()
    assert (a.features["block0"][MASK == 0] == 0).all()
    assert all(torch.equal(v, a.features[k]) for k, v in net.features(spoiled, t, cond, taps).items())


def test_a_shorter_chain_answers_as_without_padding() -> None:
    net, short = made(), made(n=5)
    state = net.state_dict()
    state["net.position"] = state["net.position"][:, :5]
    short.load_state_dict(state)
    x, t = torch.randn(4, N, D), torch.tensor([0.2, 0.9, 0.5, 0.7])
    whole = net(x, t, {"points": MASK}).x0[1:2, :5]
    torch.testing.assert_close(short(x[1:2, :5], t[1:2]).x0, whole, rtol=1e-4, atol=1e-5)


def test_answers_lie_in_the_frame_and_a_shift_changes_nothing() -> None:
    net, t = made(), torch.tensor([0.2, 0.9, 0.5, 0.7])
    x, shift = torch.randn(4, N, D), torch.tensor([3.0, -2, 1])
    for cond in (None, {"points": MASK}):
        a, b = net(x, t, cond), net(x + shift, t, cond)
        torch.testing.assert_close(a.x0, b.x0, rtol=1e-4, atol=1e-5)
        assert a.x0.sum(1).abs().max() < 1e-4
        assert a.at(t / 2).sum(1).abs().max() < 1e-4
    assert not torch.allclose(made(False)(x, t).x0, made(False)(x + shift, t).x0, atol=1e-2)


def test_without_a_mask_no_point_is_left_out() -> None:
    net, t, x = made(), torch.full((2,), 0.4), torch.randn(2, N, D)
    torch.testing.assert_close(net(x, t).x0, net(x, t, {"points": torch.ones(2, N)}).x0, rtol=1e-4, atol=1e-6)


def test_labels_and_heads() -> None:
    net, t, x = made(classes=3), torch.full((4,), 0.4), torch.randn(4, N, D)
    label = torch.tensor([0, 1, 2, 3])
    assert torch.equal(net(x, t, label).x0, net(x, t, {"label": label}).x0)
    assert not torch.equal(net(x, t, label).x0, net(x, t, label.flip(0)).x0)
    head = Discriminator(net, ("block1",), (x[:1], t[:1], label[:1]))
    assert head(x, t, {"label": label, "points": MASK}).shape == (4, 1)


def test_what_it_is_not_for_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"dit1d is for points \(n, d\); the data has shape \[1, 8, 8\]"):
        DiT1DSpec().build(Site((1, 8, 8), 0, {}, 0))
    with pytest.raises(ValueError, match="heads 3 must divide width 64"):
        DiT1DSpec(heads=3)
    net = made()
    with pytest.raises(ValueError, match=r"DiT1D: does not take cond\['text'\]"):
        net(torch.randn(1, N, D), torch.full((1,), 0.5), {"text": torch.zeros(1, 2, 2)})
