"""Digits as solids: a grey level becomes the height of a column of voxels, and depth is the channel axis."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.algebra.draws import Draws
from fewstep.config import part
from fewstep.data.base import Conditions
from fewstep.data.conditions import ClassConditions
from fewstep.data.images import Digits

DEPTH = 8
"""Voxels of a column. Of 17 grey levels, rounded half to even, heights 0 and 8 have two, 2, 4 and 6 three, others one."""


def columns(x: Tensor) -> Tensor:
    """Pictures (n, 1, h, w) in [-1, 1] -> voxels (n, DEPTH, h, w), 1 up to the picture's height and -1 above.

    `fewstep.eval.metrics.voxels.heights` undoes it to 1/DEPTH of [-1, 1].
    """
    height = ((x + 1) / 2 * DEPTH).round()
    floor = torch.arange(DEPTH, device=x.device).reshape(1, -1, 1, 1)
    return torch.where(floor < height, 1.0, -1.0)


@part("data", "voxel-digits")
class VoxelDigits:
    """scikit-learn's 1,797 digits as solids of 8 x 8 x 8 voxels, ten classes: a real set in three dimensions."""

    conditions: ClassVar[Conditions] = "classes"

    def outline(self) -> tuple[tuple[int, ...], int]:
        """As `open` has them."""
        return (DEPTH, 8, 8), 10

    def open(self) -> VoxelData:
        return VoxelData()


class VoxelData(ClassConditions):
    """Samples float32 (b, DEPTH, 8, 8), 1 where there is something and -1 elsewhere, with classes int64 (b,)."""

    classes = 10
    shape: tuple[int, ...] = (DEPTH, 8, 8)

    def __init__(self) -> None:
        images, labels = Digits().open().all()
        assert labels is not None
        self.solids, self.labels = columns(images), labels

    def batch(self, draws: Draws) -> tuple[Tensor, Any]:
        k = draws.integers(len(self.solids)).cpu()
        return self.solids[k].to(draws.device), self.labels[k].to(draws.device)

    def all(self) -> tuple[Tensor, Tensor | None]:
        return self.solids, self.labels
