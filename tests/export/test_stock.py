"""How far two sets of images are apart."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.export.stock import difference


def test_one_pixel_of_one_image_is_the_difference():
    ours = torch.zeros(5, 1, 8, 8)
    theirs = ours.clone()
    theirs[3, 0, 2, 7] = 0.01
    assert difference(ours, theirs) == pytest.approx(0.01)
    # In units of their size where that is above 1.
    assert difference(ours + 2, theirs.fill_(4)) == pytest.approx(0.5)
    theirs[0, 0, 0, 0] = math.nan
    assert math.isnan(difference(ours, theirs))
