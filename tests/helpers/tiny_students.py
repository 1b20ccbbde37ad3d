"""Students of tiny pipelines as products, without a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_pipelines import FAMILIES

from fewstep.algebra.sampling import Sampler
from fewstep.networks.diffusers import load_denoiser
from fewstep.recipe.store import load
from fewstep.train.product import Product


def make_product(folder: Path, name: str, sampler: Sampler, *settings: str) -> Product:
    """A student that is not its teacher, under a recipe that names the teacher's folder."""
    family = FAMILIES[name]
    net = load_denoiser(str(folder), size=family.shape[1:], guidance=2.5 if name == "flux" else None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        for p in net.parameters():
            p.data.add_(0.03 * torch.randn_like(p))
    recipe = load("digits-dmd2", [f"teacher.path={folder}", f"method.steps={list(sampler.steps)}", *settings])
    wrapper: Any = net.net
    return Product(net, sampler, family.shape, int(wrapper.classes), "student", (len(sampler.steps),), recipe, 7)
