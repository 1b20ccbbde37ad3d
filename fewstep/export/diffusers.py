"""Export to the stock diffusers pipeline that runs a student exactly, checked against fewstep's own sampler."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep.config import UserError
from fewstep.export.card import model_card, teacher_card, usage
from fewstep.networks.adapters import Adapted
from fewstep.networks.denoiser import Denoiser
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


def schedule(steps: Sequence[float]) -> tuple[int, str]:
    """(num_train_timesteps, call arguments) that make CMStochasticIterativeScheduler visit levels u exactly.

    The scheduler's grid is Karras's between its own sigma_max and sigma_min. With sigma_max set to the level of
    the first step, level u stands at u / steps[0] of it, and its k-th point of T at 1 - k / (T - 1). Evenly spaced
    levels are its own spacing for T = N + 1; others need T - 1 to be a common denominator, passed as `timesteps`.
    Raises UserError when there is none below 10,000.
    """
    n = len(steps)
    depth = [1 - u / steps[0] for u in steps]
    if all(abs(d - i / n) < 1e-9 for i, d in enumerate(depth)):
        return n + 1, f"num_inference_steps={n}"
    fractions = [Fraction(d).limit_denominator(9_999) for d in depth]
    common = 1
    for f in fractions:
        common = common * f.denominator // _gcd(common, f.denominator)
    if common > 9_999 or any(abs(float(f) - d) > 1e-9 for f, d in zip(fractions, depth, strict=True)):
        raise UserError(
            f"export: steps {list(steps)} lie on no grid of up to 10,000 points; round them, say to 1/1000"
        )
    index = [int(f * common) for f in fractions]
    return common + 1, f"num_inference_steps=None, timesteps={index[::-1]}"


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


def export_teacher(product: Product, folder: Path, results: Sequence[tuple[str, str]] = ()) -> Exported:
    """Write a denoiser trained here as a folder that `teacher: {name: diffusers}` reads, weights in fp16.

    The null class stays, guidance needs it; the scheduler config tells process and prediction.
    """
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    net, _ = _plain_unet(product.net)
    process: Any = net.process
    unet: Any = copy.deepcopy(net.net.model).cpu().eval()  # type: ignore[union-attr,operator]
    for p in unet.parameters():
        p.data = p.data.half()
    keys = ("sigma_min", "sigma_max", "sigma_data", "rho")
    scheduler = CMStochasticIterativeScheduler(**{k: getattr(process, k) for k in keys})
    with _aside(folder) as aside:
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
def _aside(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when all went well and vanishes otherwise."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
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


def _plain_unet(net: nn.Module) -> tuple[Denoiser, nn.Module]:
    if isinstance(net, Adapted):
        raise UserError(
            "export: the student is an adapter; train it with `student: {name: copy}` to export it"
        )
    if not (isinstance(net, Denoiser) and isinstance(net.net, UNet2D)):
        raise UserError(
            f"export: no stock diffusers pipeline runs a {type(getattr(net, 'net', net)).__name__} student"
        )
    if not isinstance(net.process, EDM) or net.prediction != "cm":
        raise UserError(
            f"export: a UNet2DModel of prediction {net.prediction!r} on {type(net.process).__name__} has no stock "
            "few-step pipeline; ConsistencyModelPipeline needs the EDM process with prediction 'cm'"
        )
    unet: Any = copy.deepcopy(net.net.model).cpu()
    if net.net.classes:
        # The null class is for training; a pipeline that draws classes at random must not draw it.
        table = unet.class_embedding.weight[: net.net.classes].detach().clone()
        unet.class_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        unet.register_to_config(num_class_embeds=net.net.classes)
    return net, unet.eval()


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
    fewstep's sampler by more than PARITY on the same noise.
    """
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    if product.recipe is None or product.sampler.kind != "renoise":
        raise UserError(f"export: {product.title} is not a few-step student that re-noises between steps")
    net, unet = _plain_unet(product.net)
    process: Any = net.process
    count, arguments = schedule(product.sampler.steps)
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=count,
        sigma_min=process.sigma_min,
        sigma_max=float(process.grid(torch.tensor(product.sampler.steps[0], dtype=torch.float64))),
        sigma_data=process.sigma_data,
        rho=process.rho,
        clip_denoised=False,  # training never clamps between steps
    )
    with _aside(folder) as aside:
        pipe = ConsistencyModelPipeline(unet=unet, scheduler=scheduler)
        pipe.save_pretrained(aside, safe_serialization=True)
        parity = measure_parity(product, aside, arguments)
        if not parity <= PARITY:
            raise UserError(
                f"export: the pipeline differs from fewstep's sampler by {parity:.2e} > {PARITY:.0e}"
            )
        call = f"class_labels=[3], {arguments}" if product.classes else arguments
        lines = usage("ConsistencyModelPipeline", shown or str(folder), call)
        u = torch.tensor(product.sampler.steps, dtype=torch.float64)
        method: Any = product.recipe.method
        facts = {
            "title": product.title,
            "about": product.recipe.about,
            "method": method.name,
            "cites": ", ".join(f"arXiv {c}" for c in method.cites),
            "calls": len(product.sampler.steps),
            "pipeline": "ConsistencyModelPipeline",
            "usage": lines,
            "sigmas": ", ".join(f"{s:.6g}" for s in process.grid(u).tolist()),
            "parity": parity,
            "done": product.done,
        }
        (aside / "README.md").write_text(model_card(facts, dump(product.recipe), results))
        first = product.sampler.steps[0]
        levels = [u / first for u in product.sampler.steps]  # on the grid below the scheduler's own sigma_max
        told = {"kind": "renoise", "steps": levels, "classes": product.classes}
        (aside / "fewstep.json").write_text(json.dumps(told))
    return Exported(folder, lines, parity)


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

    net = copy.deepcopy(product.net).cpu().float()
    ours = sample(product.sampler, net, noise(), labels, noise).clamp(-1, 1)
    return float((ours - theirs).abs().max())


def _generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]
