"""A student that is one UNet2DModel, with the scheduler that takes its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.sampling import sample
from fewstep.export.base import Parts
from fewstep.export.card import Card, student_card, usage
from fewstep.export.fold import fold
from fewstep.export.levels import check_export, check_scheduler, levels_of
from fewstep.export.routes import pipeline_of, unet_stock
from fewstep.networks.adapters import on_cpu
from fewstep.train.note import NAME, Note
from fewstep.train.product import Product


def unet_parts(product: Product, card: Card = student_card) -> Parts:
    """The stock pipeline of a UNet2DModel; errors as `choose.parts_of`."""
    plain, sampler = fold(product.net, product.sampler)
    stock = unet_stock(plain, sampler)
    name = pipeline_of(stock.name, product.classes)
    check_export(plain.process, sampler.steps, stock)
    unet: Any = plain.net.model
    unet.conv_in.weight.data *= stock.input_scale

    def save(folder: Path) -> None:
        import diffusers

        check_scheduler(plain.process, sampler.steps, stock)
        pipe = getattr(diffusers, name)(unet=unet, scheduler=stock.scheduler)
        pipe.save_pretrained(folder)

    def pairs(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
        yield both(product, folder, stock.call)

    levels = levels_of(plain.process, sampler.steps).shares()
    note = Note(classes=product.classes, sampler=stock.sampler, levels=levels, call=stock.call)
    example = {"class_labels": [product.example]} if product.classes else {}
    return Parts(
        scheduler=stock.name,
        save=save,
        pairs=pairs,
        usage=partial(usage, name, example | stock.call),
        card=partial(card, product, name),
        note=(NAME, note.text()),
    )


@torch.no_grad()
def both(product: Product, folder: Path, call: Mapping[str, Any], count: int = 20) -> tuple[Tensor, Tensor]:
    """(fewstep's, the folder's pipeline's) images (count, c, h, w) in [-1, 1], from the same generators."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    labels = product.labels(count)
    classes = {} if labels is None else {"class_labels": labels.tolist()}
    images = pipe(batch_size=count, generator=_generators(count), output_type="pt", **call, **classes).images
    generators = _generators(count)

    def noise(_: int = 0) -> Tensor:
        return torch.cat([torch.randn(1, *product.shape, generator=g) for g in generators])

    ours = sample(product.sampler, on_cpu(product.net), noise(), labels, noise)
    return ours.clamp(-1, 1), images.float() * 2 - 1


def _generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]
