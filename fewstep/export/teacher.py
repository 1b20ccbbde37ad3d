"""A denoiser trained here as a folder that `teacher: {name: diffusers}` reads, and plain diffusers with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.process import EDM, bc
from fewstep.export.base import HALF_PARITY, ExportRefused, Parts, halved
from fewstep.export.card import teacher_card
from fewstep.export.text import is_text_teacher, save_text_teacher
from fewstep.networks.adapters import Adapted, on_cpu, plain_copy
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.unet2d import UNet2D
from fewstep.networks.weights import not_finite
from fewstep.train.note import NAME, Note
from fewstep.train.product import Product


def teacher_parts(product: Product) -> Parts:
    """The folder of a teacher; ExportRefused for one that is not written."""
    net: Any = product.net.base if isinstance(product.net, Adapted) else product.net
    text = is_text_teacher(net)
    if not text:
        _check(net)
    return Parts(
        save=partial(_save_finite, product, save_text_teacher if text else _save),
        pairs=partial(_pairs, product),
        limit=HALF_PARITY,
        differs="the folder read as a teacher differs from the network in float32",
        usage=lambda folder: f"teacher: {{name: diffusers, path: {folder}}}",
        card=partial(teacher_card, product),
        note=(NAME, Note(classes=0 if text else product.classes).text()),
    )


def _check(net: Any) -> None:
    if not (isinstance(net, Denoiser) and isinstance(net.net, UNet2D)):
        raise ExportRefused(f"no stock diffusers pipeline runs a {type(getattr(net, 'net', net)).__name__} teacher")
    if net.net.image_channels:
        raise ExportRefused(
            "no stock pipeline hands a picture to a UNet2DModel; train the teacher as `unet-text`, which is written as "
            "an IFSuperResolutionPipeline"
        )
    if not isinstance(net.process, EDM) or net.prediction != "cm":
        raise ExportRefused(
            f"a teacher of prediction {net.prediction!r} on {type(net.process).__name__} is not written; "
            "train it as `unet2d`, the EDM process with prediction 'cm'"
        )


def _save_finite(product: Product, save: Callable[[Product, Path], None], folder: Path) -> None:
    bad = not_finite(plain_copy(product.net).named_parameters())
    if bad:
        raise ExportRefused(f"the weights hold NaN or infinity in {bad}; training diverged, so there is no teacher")
    save(product, folder)


def _save(product: Product, folder: Path) -> None:
    """Weights in fp16. The null class stays, guidance needs it; the scheduler config tells process and prediction."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    net: Any = plain_copy(product.net)
    unet: Any = halved(net.net.model)
    keys = ("sigma_min", "sigma_max", "sigma_data", "rho")
    scheduler = CMStochasticIterativeScheduler(**{k: getattr(net.process, k) for k in keys})
    pipe: Any = ConsistencyModelPipeline(unet=unet, scheduler=scheduler)
    pipe.save_pretrained(folder, safe_serialization=True)


@torch.no_grad()
def _pairs(product: Product, folder: Path, count: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """(x0 of the network in float32, of the folder as a recipe will open it) from noise at levels of the whole range."""
    net: Any = on_cpu(plain_copy(product.net))
    again = load_denoiser(str(folder), classes=product.classes or None, size=(product.shape[1], product.shape[2]))
    generator = torch.Generator().manual_seed(0)
    cond = again.net.example(count, generator)  # type: ignore[operator]
    t = net.process.grid(torch.linspace(0.05, 1.0, count, dtype=torch.float64))
    x = torch.randn(count, *product.shape, generator=generator)
    x = bc(torch.hypot(net.process.alpha(t), net.process.sigma(t)), x) * x
    yield net(x, t, cond).x0, again(x, t, cond).x0
