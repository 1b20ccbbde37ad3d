"""Synthetic chains: their bonds, their helices, their lengths."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.algebra.draws import Draws, fold
from fewstep.config import RecipeError
from fewstep.data.base import conditions_of
from fewstep.data.helices import BOND, RISE, TURN, Helices, chain, helix_angles
from fewstep.eval.metrics.chains import clashing, right_handed


def draws(count: int) -> Draws:
    return Draws(fold("helices test"), torch.arange(count))


def test_bonds_are_exact_and_chains_are_centred() -> None:
    x, cond = Helices(points=20).open().batch(draws(300))
    assert cond is None
    assert x.shape == (300, 20, 3)
    assert ((10 * x.double()).diff(dim=1).norm(dim=-1) - BOND).abs().max() < 1e-5
    assert x.double().mean(1).abs().max() < 1e-6
    assert clashing(10 * x).mean() < 0.1


def test_a_helix_is_the_alpha_helix() -> None:
    """Angles and torsions give the curve itself: rise 1.5, 100 degrees, right-handed, distances to four places on."""
    turn, torsion = helix_angles()
    angles = torch.tensor([[turn] * 10, [torsion] * 10], dtype=torch.float64)
    x = chain(angles[:1], angles[1:], torch.eye(3, dtype=torch.float64)[None])[0]
    radius = math.sqrt(BOND**2 - RISE**2) / (2 * math.sin(TURN / 2))
    assert radius == pytest.approx(2.279, abs=5e-4)
    k = torch.arange(12, dtype=torch.float64)
    curve = torch.stack((radius * torch.cos(TURN * k), radius * torch.sin(TURN * k), RISE * k), -1)
    torch.testing.assert_close(torch.cdist(x, x), torch.cdist(curve, curve), rtol=1e-9, atol=1e-7)
    assert right_handed(x[None]).item() == right_handed(curve[None]).item() == 1


def test_lengths_are_uniform_and_the_rest_is_padding() -> None:
    data = Helices(points=12, shortest=9).open()
    x, cond = data.batch(draws(2000))
    count = cond["points"].sum(1)
    shares = torch.stack([(count == n).double().mean() for n in range(9, 13)])
    assert (shares - 0.25).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5
    assert (x[cond["points"] == 0] == 0).all()
    assert (x.sum(1) / count[:, None]).abs().max() < 1e-6
    assert conditions_of(data) == Helices(points=12, shortest=9).conditions == "points"
    assert conditions_of(Helices().open()) == Helices().conditions == "none"


def test_directions_are_uniform() -> None:
    x, _ = Helices(points=8).open().batch(draws(4000))
    bond = 10 / BOND * x.diff(dim=1)[:, 0].double()
    assert bond.mean(0).abs().max() < 5 * (1 / 3 / 4000) ** 0.5
    assert (bond.T @ bond / 4000 - torch.eye(3) / 3).abs().max() < 5 * (4 / 45 / 4000) ** 0.5
    still = Helices(points=8, turned=False).open().batch(draws(3))[0].diff(dim=1)[:, 0]
    torch.testing.assert_close(still, torch.tensor([[0.38, 0, 0]]).expand(3, 3), rtol=0, atol=1e-6)


def test_rows_belong_to_samples() -> None:
    data = Helices(points=12, shortest=8).open()
    whole, cond = data.batch(draws(9))
    part, mine = data.batch(Draws(fold("helices test"), torch.arange(4, 9)))
    assert torch.equal(whole[4:], part)
    assert torch.equal(cond["points"][4:], mine["points"])
    assert torch.equal(data.conditions(draws(9))["points"], cond["points"])


def test_chains_that_have_no_room_for_a_hinge_are_refused() -> None:
    for sizes in ({"points": 7}, {"points": 16, "shortest": 5}, {"points": 16, "shortest": 17}):
        with pytest.raises((ValueError, RecipeError), match="at least 8 points"):
            Helices(**sizes)
