"""Operators A that take a picture to the picture which conditions: c = A(x). Torch functions of x in [-1, 1].

All but the hard ones have a gradient, which a term that pulls A(x) to c needs. Noise is the data's to add.
"""

from __future__ import annotations

from typing import Annotated, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.config import Count, NotNegative, OneOf, Positive, part

_SIDES = (1, 2, 1)


class Operator(Protocol):
    """A picture (b, c, h, w) -> what is known of it, (b, c', h', w')."""

    @property
    def name(self) -> str: ...
    @property
    def differentiable(self) -> bool:
        """Whether gradients pass: where they do not, no term of a loss can pull A(x) anywhere."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...
    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(c', h', w') for pictures (c, h, w). Raises ValueError for pictures that it does not take."""
        ...


OperatorPart = Annotated[Operator, OneOf("operator")]


def _pictures(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ValueError(f"{name}: is for pictures (c, h, w); these samples are {list(shape)}")
    return shape[0], shape[1], shape[2]


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Every channel of x (b, c, h, w) under a 3 x 3 kernel, edges repeated."""
    c = x.shape[1]
    weight = kernel.to(x).expand(c, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight, groups=c)


@part("operator", "pool")
class Pool:
    """Means of squares: low resolution, `factor` times smaller."""

    factor: Count = 2
    """Side of a square in pixels; it must divide height and width."""

    differentiable = True

    def __call__(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.factor)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        c, h, w = _pictures(shape, "pool")
        if h % self.factor or w % self.factor:
            raise ValueError(f"pool.factor: {self.factor} does not divide height and width of the data, {list(shape)}")
        return c, h // self.factor, w // self.factor


@part("operator", "blur")
class Blur:
    """The binomial filter [1 2 1] x [1 2 1] / 16, `times` times, edges repeated."""

    times: Count = 2
    """How often."""

    differentiable = True

    def __call__(self, x: Tensor) -> Tensor:
        side = torch.tensor(_SIDES, dtype=x.dtype) / 4
        for _ in range(self.times):
            x = _filtered(x, side[:, None] * side)
        return x

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _pictures(shape, "blur")


@part("operator", "box")
class Box:
    """Inpainting: the middle square is taken out and is 0, half-way between black and white."""

    size: Count = 4
    """Side of the square in pixels."""

    differentiable = True

    def __call__(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        top, left = (h - self.size) // 2, (w - self.size) // 2
        kept = torch.ones(h, w, dtype=x.dtype, device=x.device)
        kept[top : top + self.size, left : left + self.size] = 0
        return x * kept

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        c, h, w = _pictures(shape, "box")
        if self.size >= min(h, w):
            raise ValueError(f"box.size: {self.size} leaves nothing of pictures of {h} x {w}")
        return c, h, w


@part("operator", "edges")
class Edges:
    """Edges: a Sobel slope above `threshold`, from -1 (none) to 1, one channel, the mean of the data's.

    tanh((slope - threshold) / softness); Canny's edges have no gradient, and these have none at softness 0.
    """

    threshold: Positive = 0.5
    """Slope in units of the picture's range [-1, 1] a pixel."""
    softness: NotNegative = 0.1
    """Width of the step; 0 is hard."""

    @property
    def differentiable(self) -> bool:
        return self.softness > 0

    def __call__(self, x: Tensor) -> Tensor:
        grey = x.mean(1, keepdim=True)
        kernel = torch.tensor((-1.0, 0.0, 1.0), dtype=x.dtype) * torch.tensor(_SIDES, dtype=x.dtype)[:, None] / 8
        # The root's slope is infinite at 0, where pictures are flat.
        slope = (_filtered(grey, kernel) ** 2 + _filtered(grey, kernel.T) ** 2 + 1e-6).sqrt()
        return _step(slope - self.threshold, self.softness)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        _, h, w = _pictures(shape, "edges")
        return 1, h, w


@part("operator", "silhouette")
class Silhouette:
    """What is brighter than `threshold`, from -1 to 1: tanh((x - threshold) / softness) of each channel."""

    threshold: float = 0.0
    """Brightness in [-1, 1]."""
    softness: NotNegative = 0.1
    """Width of the step; 0 is hard."""

    @property
    def differentiable(self) -> bool:
        return self.softness > 0

    def __call__(self, x: Tensor) -> Tensor:
        return _step(x - self.threshold, self.softness)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _pictures(shape, "silhouette")


@part("operator", "grey")
class Grey:
    """Brightness of colour pictures, one channel: .299 R + .587 G + .114 B (ITU-R BT.601)."""

    differentiable = True

    def __call__(self, x: Tensor) -> Tensor:
        weights = torch.tensor((0.299, 0.587, 0.114), dtype=x.dtype, device=x.device)
        return (x * weights[:, None, None]).sum(1, keepdim=True)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        c, h, w = _pictures(shape, "grey")
        if c != 3:
            raise ValueError(f"grey: is for pictures of 3 channels; these have {c}")
        return 1, h, w


def _step(x: Tensor, softness: float) -> Tensor:
    return torch.tanh(x / softness) if softness else torch.where(x > 0, 1.0, -1.0).to(x.dtype)
