"""Metrics of chains against closed forms: exact helices, known clashes, two-sample tests of known laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.eval.errors import InputError
from fewstep.eval.metrics import chains


def helix(n: int = 14, bond: float = 3.8, mirrored: bool = False) -> Tensor:
    turn = math.radians(-100 if mirrored else 100)
    radius = math.sqrt(bond**2 - 1.5**2) / (2 * math.sin(abs(turn) / 2))
    k = torch.arange(n, dtype=torch.float64)
    return torch.stack((radius * torch.cos(turn * k), radius * torch.sin(turn * k), 1.5 * k), -1)


def ended(x: Tensor, n: int) -> Tensor:
    return torch.cat((x, x.new_zeros(n - len(x), 3)))


def test_bond_error_of_exact_helices_is_zero_and_of_longer_ones_the_difference() -> None:
    x = torch.stack((helix(), ended(helix(9), 14)))
    assert chains.lengths(x).tolist() == [14, 9]
    assert chains.bond_errors(x).abs().max() < 1e-12
    wide = torch.stack((helix(bond=4.0), ended(helix(6, bond=3.5), 14)))
    torch.testing.assert_close(chains.bond_errors(wide), torch.tensor([0.2, 0.3], dtype=torch.float64), rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="fewer than two points"):
        chains.bond_errors(torch.zeros(1, 5, 3))


def test_a_clash_is_seen_where_it_is_and_not_between_neighbours() -> None:
    line = torch.zeros(5, 3)
    line[:, 0] = 3.8 * torch.arange(1, 6)
    folded, near = line.clone(), line.clone()
    folded[4] = line[0] + torch.tensor([0, 3.4, 0])
    near[3] = line[1] + torch.tensor([0, 1.0, 0])  # two places apart: no clash by definition
    near[4] = near[3] + torch.tensor([0, 3.8, 0])
    short = ended(line[:3], 5)  # its padding lies within 3.5 of nothing that is there
    assert chains.clashing(torch.stack((line, folded, near, short))).tolist() == [0, 1, 0, 0]


def test_radius_of_gyration_of_a_rod() -> None:
    rod = torch.zeros(1, 9, 3)
    rod[0, :5, 1] = 2.0 * torch.arange(1, 6)
    assert chains.gyration(rod).item() == pytest.approx(2 * math.sqrt((5**2 - 1) / 12))
    assert chains.gyration(rod + 7 * (rod != 0)).item() == pytest.approx(2 * math.sqrt(2))


def test_wasserstein_of_shifted_and_of_uneven_sets() -> None:
    a = torch.randn(30, generator=torch.Generator().manual_seed(0))
    assert chains.wasserstein(a, a + 0.7) == pytest.approx(0.7, abs=1e-6)
    assert chains.wasserstein(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0, 3.0])) == pytest.approx(
        1 / 6 * 1 + 1 / 3 * 2
    )
    assert chains.wasserstein(a, a[torch.randperm(30)]) == pytest.approx(0, abs=1e-12)


def test_a_mirror_image_is_told_by_handedness_alone() -> None:
    right, left = helix()[None], helix(mirrored=True)[None]
    assert chains.right_handed(right).item() == 1
    assert chains.right_handed(left).item() == 0
    torch.testing.assert_close(chains.distances(right), chains.distances(left))


def test_distances_do_not_change_under_a_motion_and_end_with_the_chain() -> None:
    x = torch.stack((helix(), ended(helix(9), 14)))
    turned, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    moved = torch.where((x != 0).any(-1, keepdim=True), x @ turned.T + 5, x)
    torch.testing.assert_close(chains.distances(x), chains.distances(moved))
    assert (chains.distances(x)[1] > 0).sum() == 9 * 8 / 2


def test_nearest_neighbours_tell_laws_apart() -> None:
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(600, 4, generator=g), torch.randn(600, 4, generator=g)
    same = chains.one_nearest_neighbour(a, b)
    assert same.standard_error is not None
    assert abs(same.value - 0.5) < 4 * same.standard_error
    assert chains.one_nearest_neighbour(a, b + 9).value == 1
    assert chains.one_nearest_neighbour(a, a + 1e-6 * b).value < 0.01  # copies
    assert 0.6 < chains.one_nearest_neighbour(a, b + 1).value < 0.9
    # Every point k times in x and k times in y: of the 2 k - 1 others at distance 0 k - 1 are of its own set.
    for k in (1, 2, 3):
        x = a[:60].repeat_interleave(k, 0)
        for y in (x, x.flip(0)):
            told = chains.one_nearest_neighbour(x, y)
            assert told.value == pytest.approx((k - 1) / (2 * k - 1), abs=1e-12)
    with pytest.raises(InputError, match="two sets of one size, not 600 and 5"):
        chains.one_nearest_neighbour(a, b[:5])
    with pytest.raises(InputError, match="not finite"):
        chains.one_nearest_neighbour(a, b / 0)
