"""Solids of voxels: heights and back, holes, overlaps, and the digits as a set of them."""

from __future__ import annotations

import pytest
import torch

from fewstep.algebra.draws import Draws, fold
from fewstep.commands.judge import check_fit
from fewstep.config import UserError
from fewstep.data.images import Digits
from fewstep.data.voxels import VoxelDigits, columns
from fewstep.eval.metrics.voxels import filled, heights, holes, nearest_overlap
from fewstep.eval.protocol.preset import load_preset


def test_a_digit_is_its_heights_to_half_a_voxel() -> None:
    pictures, labels = Digits().open().all()
    data = VoxelDigits().open()
    solids, same = data.all()
    assert labels is not None
    assert same is not None
    assert torch.equal(labels, same)
    error = (heights(solids) - pictures).abs()
    assert error.max() == 0.125
    assert holes(solids).max() == 0
    assert filled(solids).double().mean().item() == pytest.approx(0.305, abs=5e-4)
    grey = columns(torch.linspace(-1, 1, 17).reshape(17, 1, 1, 1)).gt(0).sum(1).flatten()
    assert grey.bincount().tolist() == [2, 1, 3, 1, 3, 1, 3, 1, 2]
    # What is a height already comes back exactly.
    assert torch.equal(heights(columns(heights(solids))), heights(solids))


def test_batches_are_solids_with_their_classes() -> None:
    data = VoxelDigits().open()
    x, label = data.batch(Draws(fold("voxels"), torch.arange(50)))
    solids, labels = data.all()
    assert labels is not None
    assert x.shape == (50, *VoxelDigits().outline()[0])
    for solid, k in zip(x[:5], label[:5], strict=True):
        assert (solids[labels == k] == solid).flatten(1).all(1).any()


def test_a_voxel_above_a_hole_hangs() -> None:
    x = -torch.ones(2, 4, 1, 2)
    x[0, :3, 0, 0] = 1
    x[1, [0, 2, 3], 0, 0] = 1
    x[1, 1, 0, 1] = 0.3
    assert holes(x).tolist() == [0, 0.5]


def test_overlap_with_the_nearest() -> None:
    real = columns(torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1))
    x = columns(torch.tensor([0.5, 1.0]).reshape(2, 1, 1, 1))
    assert nearest_overlap(x, real).value == pytest.approx((6 / 8 + 1) / 2)


def test_presets_say_what_they_are_for() -> None:
    check_fit(load_preset("voxels"), (8, 8, 8), 10)
    check_fit(load_preset("chains"), (24, 3), 0)
    with pytest.raises(UserError, match=r"voxels is for solids of 8 x 8 x 8 voxels; these samples are \[1, 8, 8\]"):
        check_fit(load_preset("voxels"), (1, 8, 8), 10)
    with pytest.raises(
        UserError, match=r"chains is for chains of points in space, \(n, 3\); these samples are \[24, 2\]"
    ):
        check_fit(load_preset("chains"), (24, 2), 0)
    with pytest.raises(UserError, match="energy is for vectors and points"):
        check_fit(load_preset("energy"), (1, 8, 8), 0)
