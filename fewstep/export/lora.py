"""A trained adapter as a LoRA file that diffusers' `load_lora_weights` opens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.config import UserError
from fewstep.export.base import Exported, ExportRefused, Parts, Rows, Stock, write_checked
from fewstep.export.card import drawing
from fewstep.export.latent import call_of, stock_of, wrapped
from fewstep.networks.adapters import Adapted, network_of, plain_copy
from fewstep.networks.lora_file import NAME, component, diffusers_model, lora_tensors, save_lora
from fewstep.networks.lora_formats import merged_by_comfyui
from fewstep.train.product import Product


def export_lora(product: Product, folder: Path, layout: str = "diffusers") -> Exported:
    """Write the adapter of a run as `pytorch_lora_weights.safetensors` in a new folder, its scheduler beside it.

    A few-step adapter under the teacher's own scheduler gives other samples than were trained, so the folder carries
    the scheduler that takes its steps, and the card how both are loaded, or why there is none. Before the command
    succeeds, diffusers loads and fuses the file, and every weight is compared with the merge made here; in ComfyUI's
    layout by that program's rule. layout: one of `fewstep.networks.lora_formats.FORMATS`. Raises
    ExportRefused for a student that is no adapter, and for models that diffusers loads no LoRA into; further errors as
    `write_checked`.
    """
    return write_checked(lora_parts(product, layout), folder)


def lora_parts(product: Product, layout: str = "diffusers") -> Parts:
    """The adapter, compared by its weights, each relative to the largest of its layer; errors as `export_lora`."""
    net = product.net
    if not isinstance(net, Adapted):
        raise ExportRefused("--lora needs a student that is an adapter, `student: {name: lora}`")
    if net.beside:
        raise ExportRefused("the student's calls use adapters of other roles too, and a file holds one; leave out --lora")
    _, model = diffusers_model(network_of(net.base))
    if not hasattr(model, "load_lora_adapter"):
        raise ExportRefused(
            f"diffusers loads no LoRA file into a {type(model).__name__}; export fused weights, without --lora"
        )
    stock, usage = _stock(product, net)

    def save(folder: Path) -> None:
        save_lora(net, folder / NAME, layout)
        if stock is not None:
            stock.scheduler.save_pretrained(folder / "scheduler")

    # On the grid of the scheduler beside it: a flow's shift is in the levels of the call.
    written = product.sampler if stock is None else stock.sampler
    note: dict[str, Any] = {"kind": written.kind, "steps": list(written.steps)}
    if stock is not None:
        note["call"] = stock.call
    return Parts(
        scheduler="" if stock is None else stock.name,
        save=save,
        pairs=partial(_pairs, net, layout),
        usage=usage,
        card=partial(_card, product, net),
        note=("fewstep.json", json.dumps(note)),
        differs=f"weights into which {_WHO[layout]} fuses {NAME} differ from those merged here",
    )


def _stock(product: Product, net: Adapted) -> tuple[Stock | None, Callable[[str], str]]:
    """(the scheduler for the adapter's steps or None, lines of code that load both)."""
    if not wrapped(net):
        return None, _load
    try:
        source, wrapper, stock = stock_of(product)
    except UserError as error:
        reason = str(error).splitlines()[0]
        return None, lambda folder: f"{_load(folder)}  # no scheduler: {reason}"
    name, call = source.index["_class_name"], call_of(product, source, wrapper, stock)

    def usage(folder: str) -> str:
        return (
            f"from diffusers import {name}, {stock.name}\n"
            f'pipe = {name}.from_pretrained("{source.root}")\n'
            f"{_load(folder)}\n"
            f'pipe.scheduler = {stock.name}.from_pretrained("{folder}", subfolder="scheduler")\n'
            f"{drawing(call)}"
        )

    return stock, usage


def _load(folder: str) -> str:
    return f'pipe.load_lora_weights("{folder}")'


_WHO = {"diffusers": "diffusers", "kohya": "diffusers", "comfyui": "ComfyUI's rule"}
"""Whose merging of a layout is compared with ours."""


@torch.no_grad()
def _pairs(net: Adapted, layout: str, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """(merged here, fused by `_WHO`) of every weight, over the largest of its layer."""
    ours: Any = diffusers_model(network_of(plain_copy(net)))[1]
    theirs: Any = diffusers_model(network_of(plain_copy(net.base)))[1]
    if layout == "comfyui":
        from safetensors.torch import load_file

        found: dict[str, Tensor] = load_file(folder / NAME)
        fused = merged_by_comfyui(found, {k: v.cpu() for k, v in theirs.state_dict().items()}, component(theirs))
    else:
        if layout == "kohya":
            from diffusers.loaders import StableDiffusionLoraLoaderMixin

            state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
                str(folder), weight_name=NAME, unet_config=theirs.config
            )
            theirs.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
        else:
            theirs.load_lora_adapter(folder, prefix=component(theirs), weight_name=NAME)
        theirs.fuse_lora()
        theirs.unload_lora()
        fused = theirs.state_dict()
    for key, value in ours.state_dict().items():
        if value.is_floating_point():
            scale = max(float(value.abs().max()), 1e-12)
            yield value.cpu().double() / scale, fused[key].cpu().double() / scale


def _card(product: Product, net: Adapted, usage: str, parity: float, _: Rows) -> str:
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
        f"```python\n{usage}\n```\n"
    )
