"""Students of tiny pipelines as products, without a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_pipelines import FAMILIES

from fewstep.algebra.sampling import Sampler
from fewstep.networks.adapters import frozen
from fewstep.networks.controlnet import ControlNetSpec
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.parts import Site
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


def controlled_product(folder: Path, name: str, sampler: Sampler, size: tuple[int, int] | None = None) -> Product:
    """A ControlNet that has an effect beside the frozen UNet of a folder, on latents of a height and width."""
    like = make_product(folder, name, sampler)
    shape = (like.shape[0], *(size or like.shape[1:]))
    image = (3, shape[1] * 2, shape[2] * 2)
    teacher: Any = frozen(load_denoiser(str(folder), size=shape[1:]))
    net: Any = ControlNetSpec().build(Site(shape, 0, {"teacher": teacher}, 3, image))
    generator = torch.Generator().manual_seed(3)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return replace(like, net=net, shape=shape, image=image)
