"""The diffusion transformer over points: one token a point, padding masked, the centred frame where it is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.algebra.condition import checked
from fewstep.algebra.points import centred, padded, points_of
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import Flow, ProcessPart
from fewstep.config import Count, RecipeError, part
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.dit import Block, check_taps, through
from fewstep.networks.extras import Extras, Fourier, Input
from fewstep.networks.parts import Site, check_image, check_prediction, check_weights, seeded


class DiT1D(nn.Module):
    """Points (b, n, d) -> raw of the same shape; a point's place in the sequence has an embedding of its own.

    Args:
        shape: (n, d) of one sample.
        width, depth, heads: of the transformer; heads must divide width.
        classes: 0 for none; index `classes` is the null class.
        inputs: scalar inputs beside the time, see fewstep.networks.extras.
        centred: answers lie in the frame of `fewstep.algebra.points.centred`.
    Taps: "block0" .. "block{depth-1}", tokens (b, n, width).
    """

    def __init__(
        self,
        shape: tuple[int, int],
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        classes: int = 0,
        inputs: tuple[str, ...] = (),
        centred: bool = False,
    ) -> None:
        super().__init__()
        n, d = shape
        self.shape, self.centred = shape, centred
        self.embed = nn.Linear(d, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, n, width))
        self.time = Fourier(width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.extras = Extras(width, inputs)
        self.last = nn.Linear(width, d)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def frame(self, x: Tensor, cond: Any) -> Tensor:
        """x (b, n, d) in the frame of the answers: zeros at padding, centred where these are."""
        points = points_of(cond)
        return centred(x, points) if self.centred else padded(x, points)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        cond: Any = None,
        *,
        taps: Sequence[str] = (),
        stop: bool = False,
        extras: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """x (b, n, d), time (b,) an angle in [0, pi/2], cond int (b,), a mapping of label and points, or None."""
        check_taps(taps, self.blocks)
        given = checked(cond, (), ("label", "points"), "DiT1D")
        embedding = self.time(time) + self.extras.embed(extras)
        if self.label is not None and "label" in given:
            embedding = embedding + self.label(given["label"])
        embedding = F.silu(embedding)
        mask = given["points"] > 0 if "points" in given else None
        last, features = through(self.blocks, self.embed(x) + self.position, embedding, taps, stop, mask)
        features = {tap: padded(tokens, given.get("points")) for tap, tokens in features.items()}
        if last is None:
            return None, features
        return self.frame(self.last(F.layer_norm(last, last.shape[-1:])), cond), features


class PointDenoiser(Denoiser):
    """A denoiser that sees points in its network's frame: what lies outside, of noise too, is no part of its answer.

    So full noise will do everywhere: rollouts, critics and samplers need not know of the frame.
    """

    net: DiT1D

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        """As `Denoiser`, of x (b, n, d)."""
        return super().forward(self.net.frame(x, cond), t, cond, **call)

    def features(self, x: Tensor, t: Tensor, cond: Any, taps: Sequence[str]) -> Mapping[str, Tensor]:
        """As `Denoiser`, of x (b, n, d)."""
        return super().features(self.net.frame(x, cond), t, cond, taps)


@part("network", "dit1d")
class DiT1DSpec:
    """The diffusion transformer over samples of points (n, d), one token a point."""

    width: Count = 64
    """Channels of a token."""
    depth: Count = 4
    """Number of blocks."""
    heads: Count = 4
    """Attention heads; they must divide the width."""
    centred: bool = False
    """Samples have mean zero over their points, and so has all that it answers: translation does not count."""
    process: ProcessPart = Flow()
    """The noising process in which it answers."""
    prediction: str = "velocity"
    """What it answers: x0, eps, v, velocity (dx/dt), psi (eps - x0), score, trig; edm and cm on the process edm."""
    inputs: tuple[Input, ...] = ()
    """Scalar inputs beside the time: s (destination time) or length (of the jump), w (embedded guidance), mirror
    (TwinFlow)."""

    def __post_init__(self) -> None:
        check_prediction(self.prediction, self.process)
        check_weights(12 * self.width**2 * self.depth, f"width {self.width} and depth {self.depth}")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} must divide width {self.width}")

    def build(self, site: Site) -> nn.Module:
        if len(site.shape) != 2:
            raise RecipeError(f"network dit1d is for points (n, d); the data has shape {list(site.shape)}")
        check_image(site, 0, "dit1d", able=False)
        shape = (site.shape[0], site.shape[1])
        sizes = (self.width, self.depth, self.heads, site.classes, self.inputs, self.centred)
        return PointDenoiser(seeded(site, lambda: DiT1D(shape, *sizes)), self.process, self.prediction, "angle")
