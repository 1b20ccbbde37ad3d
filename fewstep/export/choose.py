"""Which way a product is written: one network of pixels, a latent pipeline, several networks, a teacher."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.algebra.process import EDM
from fewstep.config import UserError
from fewstep.export.base import Exported, Way, aside_of
from fewstep.export.card import teacher_card
from fewstep.export.fold import fold
from fewstep.export.levels import check_export
from fewstep.export.routes import pipeline_of, route
from fewstep.export.unet import write_unet
from fewstep.networks.adapters import Adapted, plain_copy
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.routed import Routed
from fewstep.networks.unet2d import UNet2D
from fewstep.recipe.store import dump
from fewstep.train.product import Product


def export_teacher(product: Product, folder: Path, results: Sequence[tuple[str, str]] = ()) -> Exported:
    """Write a denoiser trained here as a folder that `teacher: {name: diffusers}` reads, weights in fp16.

    The null class stays, guidance needs it; the scheduler config tells process and prediction.
    """
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    from fewstep.export.text import export_text_teacher, is_text_teacher

    check_teacher_way(product)
    if is_text_teacher(product.net):
        return export_text_teacher(product, folder, results)
    net: Any = plain_copy(product.net)
    process: Any = net.process
    unet: Any = copy.deepcopy(net.net.model).cpu().eval()  # type: ignore[operator]
    for p in unet.parameters():
        p.data = p.data.half()
    keys = ("sigma_min", "sigma_max", "sigma_data", "rho")
    scheduler = CMStochasticIterativeScheduler(**{k: getattr(process, k) for k in keys})
    with aside_of(folder) as aside:
        ConsistencyModelPipeline(unet=unet, scheduler=scheduler).save_pretrained(
            aside, safe_serialization=True
        )
        (aside / "fewstep.json").write_text(json.dumps({"classes": product.classes}))
        assert product.recipe is not None
        text = teacher_card(product.title, product.recipe.about, dump(product.recipe), results, product.done)
        (aside / "README.md").write_text(text)
    lines = f"teacher: {{name: diffusers, path: {folder}}}"
    return Exported(folder, lines, 0.0)


def check_teacher_way(product: Product) -> None:
    """UserError for a teacher that is not written."""
    from fewstep.export.text import is_text_teacher

    net: Any = product.net.base if isinstance(product.net, Adapted) else product.net
    if is_text_teacher(net):
        return
    if not (isinstance(net, Denoiser) and isinstance(net.net, UNet2D)):
        raise UserError(
            f"export: no stock diffusers pipeline runs a {type(getattr(net, 'net', net)).__name__} teacher"
        )
    if not isinstance(net.process, EDM) or net.prediction != "cm":
        raise UserError(
            f"export: a teacher of prediction {net.prediction!r} on {type(net.process).__name__} is not written; "
            "train it as `unet2d`, the EDM process with prediction 'cm'"
        )


def export(
    product: Product, folder: Path, *, results: Sequence[tuple[str, str]] = (), shown: str | None = None
) -> Exported:
    """Write a folder that `DiffusionPipeline.from_pretrained` opens, or nothing at all.

    Args:
        product: an opened run.
        folder: must not exist or be an earlier export.
        results: measured rows for the model card.
        shown: the folder as the usage lines name it.

    Raises UserError when no stock pipeline can run the student, or when the reloaded pipeline differs from
    fewstep's sampler by more than PARITY on the same noise. Students that are several networks are written by
    `fewstep.export.experts`.
    """
    return way_of(product).write(folder, results=results, shown=shown)


def way_of(product: Product) -> Way:
    """The way a student is written. UserError, with everything known beforehand, when no stock pipeline can run it.

    Nothing is refused later but a folder that cannot be written and a pipeline that differs from the sampler. Weights
    are not read, so that `fewstep.export.forecast` asks the same with none.
    """
    if product.recipe is None or product.sampler.kind == "ode":
        raise UserError(f"export: {product.title} is not a few-step student")
    if product.sampler.dynamic is not None and len(product.sampler.steps) > 1:
        raise UserError(
            "export: dynamic guidance hands the student another scale at each step, which no stock pipeline does; "
            "set method.dynamic=null for one scale"
        )
    if isinstance(product.net, Routed):
        from fewstep.export.experts import way_of_routed

        return way_of_routed(product, way_of)
    from fewstep.export.latent import way_of_latent, wrapped

    if wrapped(product.net):
        return way_of_latent(product)
    plain = fold(product.net, product.sampler)
    found = route(plain.process, plain.prediction, plain.time_input, plain.sampler)
    name = pipeline_of(found.scheduler, product.classes)
    check_export(plain.process, plain.sampler.steps, found.scheduler, found.arguments)
    return Way(type(found.scheduler).__name__, partial(write_unet, product, plain, found, name))
