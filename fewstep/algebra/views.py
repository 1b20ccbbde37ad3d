"""Views of a sample: what of it one of several teachers judges, as parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.algebra.draws import Draws
from fewstep.config import Count, OneOf, part


class View(Protocol):
    """A differentiable function of samples."""

    def see(self, x: Tensor, draws: Draws) -> Tensor:
        """What is seen of x (b, *d), (b, *e). ValueError for samples that have no such view."""
        ...


@part("view", "whole")
class Whole:
    """The sample itself."""

    def see(self, x: Tensor, draws: Draws) -> Tensor:
        return x


@part("view", "negative")
class Negative:
    """The sample with its sign turned: a picture with inverted contrast."""

    def see(self, x: Tensor, draws: Draws) -> Tensor:
        return -x


@part("view", "mirror")
class Mirror:
    """Left and right exchanged: the last axis turned round."""

    def see(self, x: Tensor, draws: Draws) -> Tensor:
        return x.flip(-1)


@part("view", "coarse")
class Coarse:
    """Means over squares, as large as the sample: its low frequencies."""

    factor: Count = 2
    """Side of the squares."""

    def see(self, x: Tensor, draws: Draws) -> Tensor:
        if x.ndim != 4 or any(n % self.factor for n in x.shape[2:]):
            raise ValueError(f"view coarse: needs pictures whose sides {self.factor} divides, not {list(x.shape[1:])}")
        return functional.interpolate(functional.avg_pool2d(x, self.factor), scale_factor=float(self.factor))


@part("view", "bold")
class Bold:
    """A picture half of whose brightness comes from the brightest of the 3 x 3 pixels around: thicker strokes."""

    def see(self, x: Tensor, draws: Draws) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"view bold: needs pictures (c, h, w), not {list(x.shape[1:])}")
        return (functional.max_pool2d(x, 3, 1, 1) + x) / 2


@part("view", "frame")
class Frame:
    """One frame of a video (b, c, f, h, w), drawn anew for every sample: what a teacher of pictures can judge."""

    def see(self, x: Tensor, draws: Draws) -> Tensor:
        if x.ndim != 5:
            raise ValueError(f"view frame: needs videos (c, f, h, w), not {list(x.shape[1:])}")
        return x[torch.arange(len(x), device=x.device), :, draws.integers(x.shape[2])]


def seen_shape(views: Sequence[View], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of samples of `shape` seen through views, one after the other. ValueError for samples that have no such view.

    >>> fewstep.algebra.views.seen_shape([fewstep.algebra.views.Frame()], (3, 5, 8, 8))
    (3, 8, 8)
    """
    x = torch.zeros(1, *shape)
    for view in views:
        x = view.see(x, Draws(0, torch.zeros(1, dtype=torch.long)))
    return tuple(x.shape[1:])


ViewPart = Annotated[View, OneOf("view")]
