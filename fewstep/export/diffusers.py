"""Export to the stock diffusers pipeline that runs a student exactly, checked against fewstep's own sampler."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fewstep.config import UserError
from fewstep.export.card import model_card, teacher_card, usage
from fewstep.export.fold import Folded, fold
from fewstep.export.routes import Route, pipeline_of, route
from fewstep.lint import check_export
from fewstep.networks.adapters import Adapted, on_cpu, plain_copy
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.routed import Routed
from fewstep.networks.unet2d import UNet2D
from fewstep.process import EDM
from fewstep.product import Product
from fewstep.recipe import dump
from fewstep.sampling import sample

PARITY = 1e-4
"""Largest allowed difference between the exported pipeline and fewstep's sampler, images in [-1, 1]."""


@dataclass(frozen=True)
class Exported:
    """Where an export went, how to call it and how well it agrees."""

    folder: Path
    usage: str
    parity: float


@dataclass(frozen=True)
class Way:
    """How a product is going to be written, decided without reading a weight.

    scheduler: the stock class, "" where each network of several has its own or none. write: called with the folder,
    `results` and `shown` as `export`.
    """

    scheduler: str
    write: Callable[..., Exported]


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


@contextmanager
def aside_of(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when all went well and vanishes otherwise."""
    marks = ("fewstep.json", "steps.json", "classes.json")  # a teacher's folder has none of them
    if folder.exists() and any(folder.iterdir()) and not any((folder / m).is_file() for m in marks):
        raise UserError(f"{folder}: exists and is not an earlier export; choose another folder")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"export: {folder} could not be written: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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

        return way_of_routed(product)
    from fewstep.export.latent import way_of_latent, wrapped

    if wrapped(product.net):
        return way_of_latent(product)
    plain = fold(product.net, product.sampler)
    found = route(plain.process, plain.prediction, plain.time_input, plain.sampler)
    name = pipeline_of(found.scheduler, product.classes)
    check_export(plain.process, plain.sampler.steps, found.scheduler, found.arguments)
    return Way(type(found.scheduler).__name__, partial(_write, product, plain, found, name))


def _write(
    product: Product,
    plain: Folded,
    found: Route,
    name: str,
    folder: Path,
    *,
    results: Sequence[tuple[str, str]] = (),
    shown: str | None = None,
) -> Exported:
    """A UNet2DModel with its scheduler."""
    import diffusers

    assert product.recipe is not None
    plain.unet.conv_in.weight.data *= found.input_scale
    with aside_of(folder) as aside:
        pipe = getattr(diffusers, name)(unet=plain.unet, scheduler=found.scheduler)
        pipe.save_pretrained(aside, safe_serialization=True)
        parity = measure_parity(product, aside, found.arguments)
        if not parity <= PARITY:
            raise UserError(
                f"export: the pipeline differs from fewstep's sampler by {parity:.2e} > {PARITY:.0e}"
            )
        call = f"class_labels=[3], {found.arguments}" if product.classes else found.arguments
        lines = usage(name, shown or str(folder), call)
        facts = facts_of(product) | {"pipeline": name, "usage": lines, "parity": parity}
        (aside / "README.md").write_text(model_card(facts, dump(product.recipe), results))
        how = {"kind": found.sampler.kind, "steps": list(found.sampler.steps), "classes": product.classes}
        if found.sampler.kind == "gamma":
            how["eta"] = found.sampler.eta
        (aside / "fewstep.json").write_text(json.dumps(how))
    return Exported(folder, lines, parity)


def facts_of(product: Product) -> dict[str, Any]:
    """What every model card of a student says about its run."""
    assert product.recipe is not None
    method: Any = product.recipe.method
    process: Any = product.net.process
    t = process.grid(torch.tensor(product.sampler.steps, dtype=torch.float64))
    ratio = (process.sigma(t) / process.alpha(t)).tolist()
    return {
        "title": product.title,
        "about": product.recipe.about,
        "method": method.name,
        "cites": ", ".join(f"arXiv {c}" for c in method.cites),
        "calls": len(product.sampler.steps),
        "sigmas": ", ".join(f"{s:.6g}" for s in ratio),
        "done": product.done,
    }


@torch.no_grad()
def measure_parity(product: Product, folder: Path, arguments: str, count: int = 20) -> float:
    """max |pipeline - fewstep| in [-1, 1] over `count` samples drawn from the same generators."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    labels = product.labels(count)
    call: dict[str, Any] = eval(f"dict({arguments})", {"dict": dict, "__builtins__": {}})
    if labels is not None:
        call["class_labels"] = labels.tolist()
    images = pipe(batch_size=count, generator=_generators(count), output_type="pt", **call).images
    theirs = images.float() * 2 - 1
    generators = _generators(count)

    def noise(_: int = 0) -> Tensor:
        return torch.cat([torch.randn(1, *product.shape, generator=g) for g in generators])

    net = on_cpu(product.net)
    ours = sample(product.sampler, net, noise(), labels, noise).clamp(-1, 1)
    return float((ours - theirs).abs().max())


def _generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]
