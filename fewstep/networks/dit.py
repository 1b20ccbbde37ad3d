"""A small diffusion transformer for toys: patches, adaLN-zero blocks, joint positions (arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.algebra.condition import checked
from fewstep.networks.extras import Extras, Fourier
from fewstep.networks.patches import from_patches, patches
from fewstep.networks.picture import image_at


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    # Functional and without affine weights: compile(jvp) of nn.LayerNorm with weights fails in torch.
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the embedding; gates start at zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, embedding: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens x (b, n, width), embedding (b, width); mask (b, n) bool, the tokens that are attended to."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(embedding).chunk(6, -1)
        b, n, width = x.shape
        qkv = self.qkv(_modulate(x, shift_a, scale_a)).reshape(b, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        keys = None if mask is None else mask[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).reshape(b, n, width)
        x = x + gate_a[:, None] * self.out(attended)
        hidden = F.gelu(self.up(_modulate(x, shift_m, scale_m)), approximate="tanh")
        return x + gate_m[:, None] * self.down(hidden)


def check_taps(taps: Sequence[str], blocks: nn.ModuleList) -> None:
    """ValueError for taps that are none of "block0" .. "block{depth-1}"."""
    unknown = set(taps) - {f"block{i}" for i in range(len(blocks))}
    if unknown:
        raise ValueError(f"taps {sorted(unknown)} are unknown; allowed: block0..block{len(blocks) - 1}")


def through(
    blocks: nn.ModuleList,
    tokens: Tensor,
    embedding: Tensor,
    taps: Sequence[str],
    stop: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(tokens after the last of `Block`s, those at the taps); with stop no further than the last tap, and None."""
    features: dict[str, Tensor] = {}
    given = (embedding,) if mask is None else (embedding, mask)
    for i, block in enumerate(blocks):
        tokens = block(tokens, *given)
        if f"block{i}" in taps:
            features[f"block{i}"] = tokens
            if stop and len(features) == len(taps):
                return None, features
    return tokens, features


class DiT(nn.Module):
    """Images (b, c, h, w) -> raw of the same shape.

    Args:
        shape: (c, h, w) of one image.
        patch: side of a patch; must divide h and w.
        width, depth, heads: of the transformer; heads must divide width.
        classes: 0 for none; index `classes` is the null class.
        inputs: scalar inputs beside the time, see fewstep.networks.extras.
        image: channels of a picture that conditions, cond["image"]; 0 for none.
    Taps: "block0" .. "block{depth-1}", tokens (b, n, width).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        patch: int = 2,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        classes: int = 0,
        inputs: tuple[str, ...] = (),
        image: int = 0,
    ) -> None:
        super().__init__()
        c, h, w = shape
        if h % patch or w % patch:
            raise ValueError(f"patch {patch} must divide the image size {h} x {w}")
        if width % heads:
            raise ValueError(f"heads {heads} must divide width {width}")
        self.shape, self.patch = shape, patch
        self.embed = nn.Linear(c * patch * patch, width)
        self.image_channels = image
        self.picture = nn.Linear(image * patch * patch, width, bias=False) if image else None
        self.position = nn.Parameter(0.02 * torch.randn(1, (h // patch) * (w // patch), width))
        self.time = Fourier(width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.extras = Extras(width, inputs)
        self.last = nn.Linear(width, c * patch * patch)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def add_image(self, channels: int) -> None:
        """Take cond["image"] of so many channels, without effect yet. Raises ValueError where it takes one."""
        if self.image_channels:
            raise ValueError(f"this DiT takes a picture of {self.image_channels} channels already")
        weight = self.embed.weight
        self.image_channels, columns = channels, channels * self.patch**2
        self.picture = nn.Linear(columns, weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.picture.weight)

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
        """x (b, c, h, w), time (b,) an angle in [0, pi/2], cond int (b,), a mapping of label and image, or None."""
        check_taps(taps, self.blocks)
        given = checked(cond, ("image",) if self.image_channels else (), ("label",), "DiT")
        embedding = self.time(time) + self.extras.embed(extras)
        if self.label is not None and "label" in given:
            embedding = embedding + self.label(given["label"])
        embedding = F.silu(embedding)
        tokens = self.embed(patches(x, self.patch))
        if self.picture is not None:
            picture = image_at(given["image"], x, self.image_channels, "DiT").to(x.dtype)
            tokens = tokens + self.picture(patches(picture, self.patch))
        last, features = through(self.blocks, tokens + self.position, embedding, taps, stop)
        if last is None:
            return None, features
        out = self.last(F.layer_norm(last, last.shape[-1:]))
        return from_patches(out, self.shape[1:], self.patch), features
