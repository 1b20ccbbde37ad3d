"""The frame of points: what centring does to noise, to padding and to means."""

from __future__ import annotations

import torch

from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.points import centred, fill_of, over_points, padded, points_of

MASK = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


def test_centred_noise_has_the_covariance_of_the_frame() -> None:
    """As a linear map: P = I - 1/n over the points that are there, and P P^T = P is the covariance of P noise."""
    basis = torch.eye(5, dtype=torch.float64)[:, :, None]  # five samples of one coordinate, each a unit vector
    for row in MASK:
        n = int(row.sum())
        got = centred(basis, row.expand(5, 5))[..., 0].T
        want = torch.zeros(5, 5, dtype=torch.float64)
        want[:n, :n] = torch.eye(n, dtype=torch.float64) - 1 / n
        torch.testing.assert_close(got, want, rtol=0, atol=1e-15)
        torch.testing.assert_close(got @ got.T, want, rtol=0, atol=1e-15)
    torch.testing.assert_close(centred(basis), centred(basis, torch.ones(5, 5)), rtol=0, atol=1e-15)


def test_drawn_noise_has_it_too() -> None:
    mask = MASK[1].expand(40_000, 5)
    noise = centred(Draws(fold("frame"), torch.arange(40_000)).normal(5, 2), mask).double()
    got = torch.einsum("bid,bjd->ij", noise, noise) / (2 * len(noise))
    want = torch.zeros(5, 5, dtype=torch.float64)
    want[:3, :3] = torch.eye(3, dtype=torch.float64) - 1 / 3
    # A variance of N numbers is off by sqrt(2 / N): five standard errors.
    assert (got - want).abs().max() < 5 * (2 / 80_000) ** 0.5


def test_what_stands_at_padding_changes_no_bit() -> None:
    x = torch.randn(3, 5, 2)
    spoiled = torch.where(MASK[..., None] > 0, x, torch.tensor(float("inf")))
    for f in (padded, centred):
        assert torch.equal(f(x, MASK), f(spoiled, MASK))
        assert (f(x, MASK)[MASK == 0] == 0).all()
    assert torch.equal(padded(x, None), x)


def test_means_are_over_the_points_that_are_there() -> None:
    x = padded(torch.randn(3, 5, 2), MASK)
    cond = {"points": MASK}
    want = torch.stack([row[: int(n)].mean() for row, n in zip(x, MASK.sum(1), strict=True)])
    fill = fill_of(cond)
    assert fill is not None
    torch.testing.assert_close(x.flatten(1).mean(1) * fill.to(x), want)
    torch.testing.assert_close(over_points(2 * torch.ones(3), cond), (2 * fill).float())
    weight = torch.rand(3)
    assert over_points(weight, None) is weight
    assert over_points(weight, torch.zeros(3, dtype=torch.long)) is weight
    assert points_of({"label": weight}) is None
