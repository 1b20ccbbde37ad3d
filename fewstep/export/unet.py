"""A UNet2DModel with its scheduler, checked against fewstep's own sampler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.sampling import sample
from fewstep.config import UserError
from fewstep.export.base import PARITY, Exported, aside_of, facts_of
from fewstep.export.card import model_card, usage
from fewstep.export.fold import Folded
from fewstep.export.routes import Route
from fewstep.networks.adapters import on_cpu
from fewstep.recipe.store import dump
from fewstep.train.product import Product


def write_unet(
    product: Product,
    plain: Folded,
    found: Route,
    name: str,
    folder: Path,
    *,
    results: Sequence[tuple[str, str]] = (),
    shown: str | None = None,
) -> Exported:
    """Write the network with its scheduler and measure it; arguments and errors as `choose.export`."""
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
