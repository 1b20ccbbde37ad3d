"""Features of samples that a loss can be taken of: a metric's network, the samples themselves, or random waves."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.config import Absent, UserError, config
from fewstep.files import expanded

WAVES = 64
WIDEST = 4096
"""Features of a representation: a covariance of so many is 128 MiB, and each update takes its eigenvalues."""


@config
class Representation:
    """What a Frechet distance is taken in, by the name of a feature network."""

    of: str = "inception-2015"
    """A feature network of the evaluation (house-digits, effnet-lite0-SIDE, inception-2015, dinov2, ...), `pixels` for
    the samples as they are, or `waves-SEED`: 64 cosines of random projections of the sample, for any data."""
    path: str | None = None
    """File of the network's weights, where its name does not tell (dinov2) or the file lies elsewhere."""

    def files(self) -> list[Path]:
        """The file that is named."""
        return [] if self.path is None else [expanded(self.path)]

    def open(self, shape: tuple[int, ...]) -> Features:
        """The features for samples of a shape, frozen.

        Raises:
            Absent: its weights are not there.
            UserError: an unknown name, more than WIDEST features, samples that it does not take, or a network that gives
                no gradient.
        """
        from fewstep.eval.errors import InputError
        from fewstep.eval.features.extractors import build_extractor  # feature networks are slow to import

        if self.of == "pixels":
            self._check_width(math.prod(shape), shape)
            return Features(self.of, nn.Flatten(), math.prod(shape))
        if match := re.fullmatch(r"waves-(\d+)", self.of):
            return Features(self.of, Waves(int(match[1]), math.prod(shape)), WAVES)
        try:
            net: Any = build_extractor(self.of, None if self.path is None else expanded(self.path))
        except OSError as error:
            raise Absent(f"representation {self.of}: {error}") from None
        except (InputError, ValueError) as error:
            raise UserError(f"representation {self.of}: {error}") from None
        if not isinstance(net, nn.Module):
            raise UserError(
                f"representation {self.of}: is no network of pictures; take pixels, waves-SEED or one that is"
            )
        dim: Any = net.dim
        self._check_width(dim, shape)
        found = Features(self.of, Pictured(net.requires_grad_(False).eval()), dim)
        try:
            told = found(torch.zeros(2, *shape, requires_grad=True))
        except (InputError, ValueError) as error:
            raise UserError(f"representation {self.of}: samples of shape {list(shape)} do not fit: {error}") from None
        if not told.requires_grad:
            raise UserError(f"representation {self.of}: gives no gradient, so nothing can be trained on it; take another")
        return found

    def _check_width(self, dim: int, shape: tuple[int, ...]) -> None:
        if dim > WIDEST:
            raise UserError(
                f"representation {self.of}: has {dim:,} features of samples of shape {list(shape)}, and a covariance may "
                f"be of {WIDEST:,} at most; take waves-SEED, which has {WAVES}, or a feature network"
            )


class Features(nn.Module):
    """Samples (b, *d) in [-1, 1] -> float64 features (b, dim), with a gradient to the samples."""

    def __init__(self, name: str, net: nn.Module, dim: int) -> None:
        super().__init__()
        self.name, self.net, self.dim = name, net, dim

    def forward(self, x: Tensor) -> Tensor:
        # The data's features are taken outside the autocast of a training, the student's within it; they are compared.
        with torch.autocast(x.device.type, enabled=False):
            return self.net(x.float()).double()


class Pictured(nn.Module):
    """A metric's network on x (b, c, h, w) in [-1, 1]; what lies beyond is shown at the border and keeps its gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        pixels = 127.5 * (x + 1)
        return self.net(pixels.detach().clamp(0, 255) + (pixels - pixels.detach()))


class Waves(nn.Module):
    """cos(W x + b) from a seed: (b, *d) -> (b, WAVES), W normal of deviation 0.5 to 3 over sqrt(size), b uniform."""

    weights: Tensor
    phases: Tensor

    def __init__(self, seed: int, size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        # Long waves say where a sample is, short ones in which mode; short ones alone pull in all directions at once.
        scale = torch.linspace(0.5, 3, WAVES) / size**0.5
        self.register_buffer("weights", torch.randn(size, WAVES, generator=generator) * scale)
        self.register_buffer("phases", torch.rand(WAVES, generator=generator) * 2 * math.pi)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(x.flatten(1) @ self.weights + self.phases)
