"""A generative equilibrium transformer: noise in, a sample out, by iterating one stack of blocks (arXiv 2401.08639)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.algebra.condition import label_of
from fewstep.algebra.process import Flow
from fewstep.config import Count, RecipeError, part
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.extras import Extras
from fewstep.networks.parts import Site, check_image, check_weights, seeded
from fewstep.networks.patches import from_patches, patches


def grid_positions(height: int, width: int, channels: int) -> Tensor:
    """Fixed sine and cosine positions (1, height * width, channels), a half of the channels for each axis."""
    quarter = channels // 4
    rates = torch.exp(-math.log(10_000.0) * torch.arange(quarter, dtype=torch.float64) / quarter)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.reshape(-1, 1).double() * rates for axis in (y, x)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1).float()[None]


class InjectedBlock(nn.Module):
    """Attention and MLP before which layer norms stand; what is injected is added to queries, keys and values."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor, injected: Tensor | None = None) -> Tensor:
        """x (b, n, width), injected (b, n or 1, 3 width) -> (b, n, width)."""
        b, n, width = x.shape
        # Functional and without weights: compile(jvp) of nn.LayerNorm with weights fails in torch.
        qkv = self.qkv(F.layer_norm(x, x.shape[-1:]))
        qkv = qkv if injected is None else qkv + injected
        q, k, v = qkv.reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:])), approximate="tanh"))


class GET(nn.Module):
    """Noise (b, c, h, w) -> a sample of the same shape; the time is not told.

    z_{k+1} = f(z_k; u) with u of the noise and the class, the same f every time, `iterations` times from z_0.

    Args:
        shape: (c, h, w) of one image.
        patch: side of a patch; must divide h and w.
        width, heads: of all blocks; heads divide the width, and 4 does.
        injection: blocks that read the noise, once.
        depth: blocks of the equilibrium stack f.
        ratio: of hidden to other channels in the MLPs of f; 4 in the injection's.
        iterations: of f.
        start: z_0, zeros or one draw of noise that is kept with the weights and is the same for all samples.
        classes: 0 for none; index `classes` is the null class.
        checkpointing: recompute every iteration in the backward pass, so that memory does not grow with their number.
    Taps: "iterate0" .. the decoded z_1 .., pictures; "residual" |z_{k+1} - z_k| / |z_{k+1}| of every iteration
    (iterations,).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        patch: int = 2,
        width: int = 64,
        heads: int = 4,
        injection: int = 2,
        depth: int = 3,
        ratio: int = 4,
        iterations: int = 6,
        start: Literal["zeros", "noise"] = "zeros",
        classes: int = 0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        c, h, w = shape
        self.shape, self.patch, self.iterations = shape, patch, iterations
        self.depth, self.checkpointing = depth, checkpointing
        self.embed = nn.Linear(c * patch * patch, width)
        self.position: Tensor
        self.register_buffer("position", grid_positions(h // patch, w // patch, width), persistent=False)
        self.reading = nn.ModuleList(InjectedBlock(width, heads, 4) for _ in range(injection))
        self.inject = nn.Linear(width, 3 * width * depth, bias=False)
        self.label = nn.Embedding(classes + 1, 3 * width) if classes else None
        self.stack = nn.ModuleList(InjectedBlock(width, heads, ratio) for _ in range(depth))
        self.extras = Extras(width, ())
        self.origin: Tensor
        shape_of = (1, (h // patch) * (w // patch), width)
        self.register_buffer("origin", torch.randn(shape_of) if start == "noise" else torch.zeros(shape_of))
        self.last = nn.Linear(width, c * patch * patch)

    @property
    def iterates(self) -> tuple[str, ...]:
        """Taps of the decoded iterates, in order."""
        return tuple(f"iterate{k}" for k in range(self.iterations))

    def _decoded(self, z: Tensor) -> Tensor:
        return from_patches(self.last(F.layer_norm(z, z.shape[-1:])), self.shape[1:], self.patch)

    def injection(self, x: Tensor, cond: Any = None) -> Tensor:
        """What is added in each block of the stack, (b, n, 3 width depth)."""
        tokens = self.embed(patches(x, self.patch)) + self.position
        for block in self.reading:
            tokens = block(tokens)
        u = self.inject(tokens)
        label = label_of(cond)
        if self.label is None or label is None:
            return u
        return u + self.label(label)[:, None].repeat(1, 1, self.depth)

    def step(self, z: Tensor, u: Tensor) -> Tensor:
        """f: z (b, n, width) once through the stack."""
        for block, injected in zip(self.stack, u.chunk(self.depth, -1), strict=True):
            z = block(z, injected)
        return z

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
        """x (b, c, h, w) noise, cond int (b,), a mapping with such a label, or None; `time` is not looked at."""
        allowed = {"residual", *self.iterates}
        if unknown := set(taps) - allowed:
            raise ValueError(f"taps {sorted(unknown)} are unknown; allowed: residual, iterate0..{self.iterations - 1}")
        u = self.injection(x, cond)
        z = self.origin.to(u.dtype).expand(len(u), -1, -1)
        features: dict[str, Tensor] = {}
        residuals: list[Tensor] = []
        for tap in self.iterates:
            again = self.checkpointing and torch.is_grad_enabled()
            after = checkpoint(self.step, z, u, use_reentrant=False) if again else self.step(z, u)
            assert isinstance(after, Tensor)
            if "residual" in taps:
                residuals.append(((after - z).norm() / after.norm()).detach())
            z = after
            if tap in taps:
                features[tap] = self._decoded(z)
        if residuals:
            features["residual"] = torch.stack(residuals)
        last = self.iterates[-1]
        return features[last] if last in features else self._decoded(z), features


@part("network", "get")
class GETSpec:
    """The generative equilibrium transformer: a one-step student that answers at the prior alone (arXiv 2401.08639)."""

    patch: Count = 2
    """Side of a patch in pixels; it must divide height and width."""
    width: Count = 64
    """Channels of a token (GET-T, M, S, B: 256, 384, 512, 768)."""
    heads: Count = 4
    """Attention heads; they must divide the width."""
    injection: Count = 2
    """Blocks that read the noise, once (6; one in B)."""
    depth: Count = 3
    """Blocks of the equilibrium stack (3)."""
    ratio: Count = 4
    """Hidden by other channels in the stack's MLPs (6 in T and M, 8 in S and B+, 12 in B)."""
    iterations: Count = 6
    """Passes through the stack (6, in training and evaluation)."""
    start: Literal["zeros", "noise"] = "zeros"
    """Hidden state before the first pass: zeros, or one draw of noise kept with the weights. Published: drawn anew at
    every call, which makes the answer random beyond its input."""
    checkpointing: bool = False
    """Recompute every pass in the backward pass: memory of one pass in place of all."""
    process: ClassVar[Flow] = Flow()
    """Its prior is the noise itself, which is the only state that it reads."""

    def __post_init__(self) -> None:
        check_weights(
            (12 * self.injection + (4 + 2 * self.ratio) * self.depth) * self.width**2,
            f"width {self.width}, injection {self.injection} and depth {self.depth}",
        )
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"heads {self.heads}, and 4 for the positions, must divide width {self.width}")

    def build(self, site: Site) -> nn.Module:
        if len(site.shape) != 3:
            raise RecipeError(f"network get is for images; the data has shape {list(site.shape)}")
        if any(n % self.patch for n in site.shape[1:]):
            raise RecipeError(f"get.patch {self.patch}: does not divide height and width of the data, {list(site.shape)}")
        check_image(site, 0, "get", able=False)
        names = ("patch", "width", "heads", "injection", "depth", "ratio", "iterations", "start", "checkpointing")
        sizes: dict[str, Any] = {name: getattr(self, name) for name in names}
        shape = (site.shape[0], site.shape[1], site.shape[2])
        net = seeded(site, lambda: GET(shape, classes=site.classes, **sizes))
        return Denoiser(net, self.process, "x0", "angle")
