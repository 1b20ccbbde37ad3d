"""A network that learns a reward of samples: r(x, cond) -> (b,), with a gradient where the reward itself has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.config import Count, RecipeError, part
from fewstep.networks.parts import Site, check_weights, seeded


class RewardModel(nn.Module):
    """Convolutions that halve pictures or latents (c, h, w) to 2 x 2, or layers for vectors (d,), and a number of them.

    Args:
        shape: of a sample.
        classes: labels that it is told, 0 for none; texts are not among them.
        width, depth: hidden units of a layer, and layers before the last.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if len(shape) == 3:
            channels, side = shape[0], min(shape[1:])
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
            while side >= 4:
                layers += [nn.Conv2d(width, width, 4, stride=2, padding=1), nn.SiLU()]
                side //= 2
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        else:
            layers += [nn.Flatten(), nn.Linear(shape[0], width), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        inner = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.SiLU())]
        self.head = nn.Sequential(*inner, nn.Linear(width, 1))

    def forward(self, x: Tensor, cond: Any = None) -> Tensor:
        """x (b, *d) -> (b,)."""
        hidden = self.trunk(x.to(torch.promote_types(x.dtype, torch.float32)))
        if self.label is not None:
            hidden = hidden + self.label(cond if isinstance(cond, Tensor) else cond["label"])
        return self.head(hidden)[:, 0]


@part("network", "reward-model")
class RewardModelSpec:
    """The role latent_reward: a small network that learns the role reward from the student's samples (DOLLAR)."""

    width: Count = 64
    """Channels of a layer, or hidden units."""
    depth: Count = 2
    """Layers before the last."""

    def __post_init__(self) -> None:
        check_weights(self.width**2 * (self.depth + 64), f"width {self.width} and depth {self.depth}")

    def build(self, site: Site) -> nn.Module:
        if len(site.shape) not in (1, 3):
            raise RecipeError(f"network reward-model is for vectors and pictures; the data has shape {list(site.shape)}")
        return seeded(site, lambda: RewardModel(site.shape, site.classes, self.width, self.depth))
