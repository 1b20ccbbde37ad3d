"""The 2-D ring of unequal Gaussians: unlimited exact samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.process import Flow
from fewstep.config import Count, part
from fewstep.data.base import Conditions
from fewstep.data.conditions import ClassConditions
from fewstep.networks.analytic import Length, ring


@part("data", "ring")
class Ring:
    """Eight Gaussians on a circle, every second one twice as heavy (see fewstep.networks.analytic.ring)."""

    modes: Count = 8
    """Gaussians on the circle."""
    radius: Length = 1.25
    """Of the circle."""
    std: Length = 0.1
    """Of every Gaussian, in each axis."""
    conditional: bool = False
    """True: the mode's number is the condition."""

    @property
    def conditions(self) -> Conditions:
        return "classes" if self.conditional else "none"

    def outline(self) -> tuple[tuple[int, ...], int]:
        """As `open` has them."""
        return (2,), self.modes if self.conditional else 0

    def open(self) -> RingData:
        return RingData(self)


class RingData(ClassConditions):
    """Samples of the ring, float32 (b, 2)."""

    def __init__(self, spec: Ring) -> None:
        self.mixture = ring(Flow(), spec.modes, spec.radius, spec.std)
        self.shape: tuple[int, ...] = (2,)
        self.classes = spec.modes if spec.conditional else 0

    def batch(self, draws: Draws) -> tuple[Tensor, Any]:
        self.mixture.to(draws.device)
        x, label = self.mixture.draw(draws)
        return x, label if self.classes else None

    def all(self) -> tuple[Tensor, Tensor | None]:
        """20,000 samples of a fixed seed."""
        x, label = self.mixture.cpu().draw(Draws(fold("ring reference"), torch.arange(20_000)))
        return x, label if self.classes else None
