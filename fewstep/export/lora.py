"""A trained adapter as a LoRA file that diffusers' `load_lora_weights` opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fewstep.config import UserError
from fewstep.export.base import Exported, aside_of
from fewstep.export.latent import call_of, stock_of, wrapped
from fewstep.networks.adapters import Adapted, network_of, plain_copy
from fewstep.networks.lora_file import NAME, component, diffusers_model, lora_tensors, save_lora
from fewstep.train.product import Product

PARITY = 1e-5
"""Largest allowed difference of a weight, relative to the largest weight of its layer."""


def export_lora(product: Product, folder: Path) -> Exported:
    """Write the adapter of a run as `pytorch_lora_weights.safetensors` in a new folder, its scheduler beside it.

    A few-step adapter under the teacher's own scheduler gives other samples than were trained, so the folder carries
    the scheduler that takes its steps, and the card how both are loaded, or why there is none. Before the command
    succeeds, diffusers loads and fuses the file, and every weight is compared with the merge made here. Raises
    UserError for a student that is no adapter, and for models that diffusers loads no LoRA into.
    """
    net = product.net
    if not isinstance(net, Adapted):
        raise UserError("export: --lora needs a student that is an adapter, `student: {name: lora}`")
    _, model = diffusers_model(network_of(net.base))
    if not hasattr(model, "load_lora_adapter"):
        raise UserError(
            f"export: diffusers loads no LoRA file into a {type(model).__name__}; export fused weights, without --lora"
        )
    scheduler, call, lines = _schedule(product, net, folder)
    with aside_of(folder) as aside:
        aside.mkdir()
        save_lora(net, aside / NAME)
        parity = _parity(net, aside)
        if not parity <= PARITY:
            raise UserError(
                f"export: diffusers fuses {NAME} to weights that differ by {parity:.1e} > {PARITY:.0e}"
            )
        if scheduler is not None:
            scheduler.save_pretrained(aside / "scheduler")
        (aside / "README.md").write_text(_card(product, net, parity, lines))
        how = {"kind": product.sampler.kind, "steps": list(product.sampler.steps)} | call
        (aside / "fewstep.json").write_text(json.dumps(how))
    return Exported(folder, lines, parity)


def _schedule(product: Product, net: Adapted, folder: Path) -> tuple[Any, dict[str, Any], str]:
    """(scheduler or None, the pipeline's call as fewstep.json tells it, lines of code that load both)."""
    load = f'pipe.load_lora_weights("{folder}")'
    if not wrapped(net):
        return None, {}, load
    try:
        source, wrapper, way = stock_of(product)
    except UserError as error:
        return None, {}, f"{load}  # no scheduler: {str(error).splitlines()[0].removeprefix('export: ')}"
    name, kind = source.index["_class_name"], type(way.scheduler).__name__
    lines = (
        f"from diffusers import {name}, {kind}",
        f'pipe = {name}.from_pretrained("{source.root}")',
        load,
        f'pipe.scheduler = {kind}.from_pretrained("{folder}", subfolder="scheduler")',
        f'pipe({call_of(wrapper, way)}).images[0].save("sample.png")',
    )
    return way.scheduler, {"call": way.call}, "\n".join(lines)


@torch.no_grad()
def _parity(net: Adapted, folder: Path) -> float:
    """max |fused by diffusers - merged here| over all weights, relative to each layer's largest."""
    ours: Any = diffusers_model(network_of(plain_copy(net)))[1]
    theirs: Any = diffusers_model(network_of(plain_copy(net.base)))[1]
    theirs.load_lora_adapter(folder, prefix=component(theirs), weight_name=NAME)
    theirs.fuse_lora()
    theirs.unload_lora()
    fused = theirs.state_dict()
    worst = 0.0
    for key, value in ours.state_dict().items():
        if value.is_floating_point():
            scale = max(float(value.abs().max()), 1e-12)
            worst = max(worst, float((value.cpu() - fused[key].cpu()).abs().max()) / scale)
    return worst


def _card(product: Product, net: Adapted, parity: float, lines: str) -> str:
    recipe: Any = product.recipe
    levels = ", ".join(f"{u:.6g}" for u in product.sampler.steps)
    count = sum(v.numel() for v in lora_tensors(net)[0].values())
    return (
        "---\nlibrary_name: diffusers\ntags: [fewstep, lora, few-step]\n---\n"
        f"# {product.title}\n\n{recipe.about}. A LoRA set made by fewstep with the method `{recipe.method.name}`.\n\n"
        "| | |\n|---|---|\n"
        f"| rank, alpha | {net.rank}, {net.alpha:g} |\n| parameters | {count} |\n"
        f"| trained at levels u, first to last | {levels} |\n| steps trained | {product.done} |\n"
        f"| fused by diffusers against merged here, largest relative difference of a weight | {parity:.1e} |\n\n"
        f"```python\n{lines}\n```\n"
    )
