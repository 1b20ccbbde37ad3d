"""Discriminator heads on the features of a denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.noising import angle_of
from fewstep.algebra.process import Process
from fewstep.networks.extras import Fourier


def _head(shape: torch.Size, width: int) -> nn.Module:
    """A head for one feature: maps (b, c, h, w), tokens (b, n, c) or vectors (b, c) to one logit (b, 1)."""
    if len(shape) == 2:
        return nn.Sequential(nn.Linear(shape[1], width), nn.SiLU(), nn.Linear(width, 1))
    if len(shape) == 3:
        return _Tokens(shape[2], width)
    layers: list[nn.Module] = []
    c, side = shape[1], min(shape[2], shape[3])
    # Halve until 4 x 4, then one kernel over what is left: DMD2's bottleneck head (arXiv 2405.14867, sec. 4.3).
    while side > 4:
        layers += [
            nn.Conv2d(c, width, 4, stride=2, padding=1),
            nn.GroupNorm(_groups(width), width),
            nn.SiLU(),
        ]
        c, side = width, side // 2
    layers += [nn.Conv2d(c, width, side), nn.GroupNorm(_groups(width), width), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1))


def _groups(width: int) -> int:
    return next(g for g in (16, 8, 4, 2, 1) if width % g == 0 and width // g >= 4)


class _Tokens(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width), nn.SiLU())
        self.out = nn.Linear(width, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.inner(tokens).mean(1))


class Discriminator(nn.Module):
    """Logits (b, heads) of noised samples, from the trunk's features; only the heads are its own parameters.

    Args:
        trunk: a denoiser, the critic or the frozen teacher. It belongs to its own role.
        taps: which features, one head each.
        example: (x, t, cond) of batch 1 to learn the features' shapes from.
        width: of a head's hidden layer; None takes the feature's channels.
    """

    def __init__(self, trunk: nn.Module, taps: Sequence[str], example: tuple[Any, ...], width: int | None = None) -> None:
        super().__init__()
        self._trunk = (trunk,)  # in a tuple, so that its parameters are not registered twice
        self.taps = tuple(taps)
        with torch.no_grad():
            features = trunk.features(*example, self.taps)  # type: ignore[operator]
        channels = {tap: f.shape[2 if f.ndim == 3 else 1] for tap, f in features.items()}
        self.heads = nn.ModuleDict({tap: _head(features[tap].shape, width or channels[tap]) for tap in self.taps})

    @property
    def trunk(self) -> nn.Module:
        return self._trunk[0]

    def logits(self, features: Any) -> Tensor:
        """Logits (b, heads) of features that a call with these taps has returned."""
        return torch.cat([_seen(self.heads[tap], features[tap]) for tap in self.taps], 1).float()

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """x (b, *d) at time t (b,) -> logits (b, heads), float32."""
        return self.logits(self.trunk.features(x, t, cond, self.taps))  # type: ignore[operator]


class LogVar(nn.Module):
    """log of an expected squared error, learned: loss = e^-l error + l (EDM2, arXiv 2312.02696, eq. 15)."""

    def __init__(self, process: Process, width: int = 32) -> None:
        super().__init__()
        self.process = process
        self.time = Fourier(width, 8)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, t: Tensor) -> Tensor:
        """Process times (b,) -> (b,), 0 at the start."""
        return self.out(torch.nn.functional.silu(self.time(angle_of(self.process, t))))[:, 0]


def _seen(head: nn.Module, features: Tensor) -> Tensor:
    """A head's logits; a trunk of half precision gives features in its own, but the heads are trained in float32."""
    cast = torch.is_autocast_enabled(features.device.type)
    return head(features if cast else features.to(next(head.parameters()).dtype))
