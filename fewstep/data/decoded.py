"""A reward of latents: another one, of the pictures that their VAE makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fewstep.networks.rewards  # noqa: F401  what is judged is one of these
from fewstep.config import RecipeError, part
from fewstep.data.latents import decoder, vae_files
from fewstep.networks.parts import NetworkPart, Site
from fewstep.networks.rewards import Opinion

AT_ONCE = 8
"""Latents that are decoded together."""


class Decoded(Opinion):
    """r(decode(x)), without a gradient: one through a VAE costs more than the student."""

    def __init__(self, vae: nn.Module, judge: nn.Module) -> None:
        super().__init__(vae)
        self.judge = judge

    @torch.no_grad()
    def forward(self, x: Tensor, cond: Any = None) -> Tensor:
        """Latents (b, c, h, w) -> (b,)."""
        return self.judge(torch.cat([self.net(part) for part in x.split(AT_ONCE)]), cond)


@part("network", "decoded")
class DecodedSpec:
    """The reward role of latents: another reward, of the pictures that a VAE makes, without a gradient.

    `by: latent_reward` or method pso goes with it (DOLLAR, arXiv 2412.15689).
    """

    of: NetworkPart
    """The reward of the pictures."""
    vae: str
    """Folder of the VAE, that of the data."""
    differentiable: ClassVar[bool] = False

    def files(self) -> list[Path]:
        return [*vae_files(self.vae), *(self.of.files() if hasattr(self.of, "files") else [])]

    def build(self, site: Site) -> nn.Module:
        if len(site.shape) != 3:
            raise RecipeError(f"network decoded is for latents of pictures; the data has shape {list(site.shape)}")
        vae = decoder(self.vae)
        small = vae(torch.zeros(1, site.shape[0], 4, 4))
        shape = (small.shape[1], *(n * small.shape[-1] // 4 for n in site.shape[1:]))
        return Decoded(vae, self.of.build(replace(site, shape=shape, image=None)))
