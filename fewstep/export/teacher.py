"""A denoiser trained here as a folder that `teacher: {name: diffusers}` reads, and plain diffusers with it."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.algebra.process import EDM
from fewstep.export.base import ExportRefused, Parts
from fewstep.export.card import teacher_card
from fewstep.export.text import is_text_teacher, save_text_teacher
from fewstep.networks.adapters import Adapted, plain_copy
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.unet2d import UNet2D
from fewstep.train.product import Product


def teacher_parts(product: Product) -> Parts:
    """The folder of a teacher; ExportRefused for one that is not written."""
    net: Any = product.net.base if isinstance(product.net, Adapted) else product.net
    text = is_text_teacher(net)
    if not text:
        _check(net)
    return Parts(
        save=partial(save_text_teacher if text else _save, product),
        usage=lambda folder: f"teacher: {{name: diffusers, path: {folder}}}",
        card=partial(teacher_card, product),
        note=("fewstep.json", json.dumps({"classes": 0 if text else product.classes})),
    )


def _check(net: Any) -> None:
    if not (isinstance(net, Denoiser) and isinstance(net.net, UNet2D)):
        raise ExportRefused(f"no stock diffusers pipeline runs a {type(getattr(net, 'net', net)).__name__} teacher")
    if not isinstance(net.process, EDM) or net.prediction != "cm":
        raise ExportRefused(
            f"a teacher of prediction {net.prediction!r} on {type(net.process).__name__} is not written; "
            "train it as `unet2d`, the EDM process with prediction 'cm'"
        )


def _save(product: Product, folder: Path) -> None:
    """Weights in fp16. The null class stays, guidance needs it; the scheduler config tells process and prediction."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    net: Any = plain_copy(product.net)
    unet: Any = copy.deepcopy(net.net.model).cpu().eval()
    for p in unet.parameters():
        p.data = p.data.half()
    keys = ("sigma_min", "sigma_max", "sigma_data", "rho")
    scheduler = CMStochasticIterativeScheduler(**{k: getattr(net.process, k) for k in keys})
    pipe: Any = ConsistencyModelPipeline(unet=unet, scheduler=scheduler)
    pipe.save_pretrained(folder, safe_serialization=True)
