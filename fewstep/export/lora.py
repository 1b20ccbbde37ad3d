"""A trained adapter as a LoRA file that diffusers' `load_lora_weights` opens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.config import UserError
from fewstep.export.base import Exported, ExportRefused, Parts, Rows, Stock, write_checked
from fewstep.export.call import call_of, pipeline_name, settings_of
from fewstep.export.card import front_of, plain, table
from fewstep.export.comfy import WORKFLOW, workflow
from fewstep.export.latent import (
    guided,
    is_video,
    stock_of,
    usage_of,
    wrapped,
)
from fewstep.files import digest_of
from fewstep.networks.adapters import Adapted, network_of, plain_copy, unhalved
from fewstep.networks.folder import Folder
from fewstep.networks.lora_file import NAME, component, diffusers_model, lora_tensors, save_lora
from fewstep.networks.lora_formats import merged_by_comfyui
from fewstep.train.product import Product


def export_lora(
    product: Product,
    folder: Path,
    layout: str = "diffusers",
    *,
    told: Rows = (),
    noted: Mapping[str, Any] | None = None,
) -> Exported:
    """Write the adapter of a run as `pytorch_lora_weights.safetensors` in a new folder, its scheduler beside it.

    A few-step adapter under the teacher's own scheduler gives other samples than were trained, so the folder carries
    the scheduler that takes its steps, and the card how both are loaded, or why there is none. Before the command
    succeeds, diffusers loads and fuses the file, and every weight is compared with the merge made here; in ComfyUI's
    layout by that program's rule. layout: one of `fewstep.networks.lora_formats.FORMATS`. told,
    noted: further rows of the card and entries of fewstep.json.

    Raises ExportRefused for a student that is no adapter, and for models that diffusers loads no LoRA into; further
    errors as `write_checked`.
    """
    return write_checked(lora_parts(product, layout, told=told, noted=noted), folder)


def lora_parts(
    product: Product, layout: str = "diffusers", *, told: Rows = (), noted: Mapping[str, Any] | None = None
) -> Parts:
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
    found, usage = _stock(product, net)
    stock = found[2] if found else None
    graph, why = _graph(product, found) if layout == "comfyui" else (None, "")

    def save(folder: Path) -> None:
        save_lora(net, folder / NAME, layout)
        if stock is not None:
            stock.scheduler.save_pretrained(folder / "scheduler")
        if graph is not None:
            (folder / WORKFLOW).write_text(json.dumps(graph, indent=1) + "\n")

    # On the grid of the scheduler beside it: a flow's shift is in the levels of the call.
    written = product.sampler if stock is None else stock.sampler
    rows = [*_guided(product, found), *_lists(product), *told]
    note: dict[str, Any] = {"kind": written.kind, "steps": list(written.steps), **(noted or {})}
    if stock is not None:
        note["call"] = stock.call
    with suppress(UserError, AttributeError):  # a teacher without files, or files that are gone by now
        note["base"] = digest_of(product.recipe.teacher.files())  # type: ignore[union-attr]
    return Parts(
        scheduler="" if stock is None else stock.name,
        save=save,
        pairs=partial(_pairs, net, layout),
        usage=usage,
        card=partial(_card, product, net, front=_front(product, found), told=rows, comfy=why),
        note=("fewstep.json", json.dumps(note)),
        differs=f"weights into which {_WHO[layout]} fuses {NAME} differ from those merged here",
    )


Found = tuple[Folder, Any, Stock]
"""The teacher's folder, its wrapper, and the scheduler that takes the adapter's steps."""


def _graph(product: Product, found: Found | None) -> tuple[dict[str, Any] | None, str]:
    """(the graph of ComfyUI's API, the card's line about it)."""
    if found is None:
        return None, "There is no workflow for ComfyUI: the steps have no stock scheduler."
    source, wrapper, _ = found
    net: Any = product.net
    high, wide = (n * wrapper.pixels for n in product.shape[-2:])
    scale = settings_of(product, source, wrapper).get("guidance_scale")
    try:
        made = workflow(str(source.index["_class_name"]), net.process, product.sampler, (high, wide), NAME, scale)
    except ExportRefused as refusal:
        return None, f"There is no workflow for ComfyUI: {refusal}."
    told = f"`{WORKFLOW}` is a graph for ComfyUI's API at the trained levels: copy `{NAME}` to its models/loras "
    return made, f"{told}and put in the names of your base model's files. ComfyUI itself was not run."


def _front(product: Product, found: Found | None) -> dict[str, str]:
    """What the hub reads above the card: the base that it adapts, its licence and task."""
    if found is None:
        return {}
    source, wrapper, _ = found
    front = front_of(source, is_video(product), "text" in wrapper.needs, bool(wrapper.image_channels))
    return front | ({"base_model_relation": "adapter"} if "base_model" in front else {})


def _stock(product: Product, net: Adapted) -> tuple[Found | None, Callable[[str], str]]:
    """(what the adapter is loaded into and the scheduler for its steps or None, lines of code that load both)."""
    if not wrapped(net):
        return None, _load
    try:
        source, wrapper, stock = stock_of(product)
    except UserError as error:
        reason = str(error).splitlines()[0]
        return None, lambda folder: f"{_load(folder)}  # no scheduler: {reason}"
    name, call = pipeline_name(source, wrapper), call_of(product, source, wrapper, stock)
    base = _front(product, (source, wrapper, stock)).get("base_model", str(source.root))

    def usage(folder: str) -> str:
        steps = f'pipe.scheduler = {stock.name}.from_pretrained("{folder}", subfolder="scheduler")'
        return usage_of(product, name, wrapper, call, also=stock.name, then=f"{_load(folder)}\n{steps}")(base)

    return (source, wrapper, stock), usage


def _guided(product: Product, found: Found | None) -> Rows:
    return guided(product, found[1]) if found else []


def _lists(product: Product) -> Rows:
    """The other numbers of steps that one adapter takes, with their levels and how their scheduler is written."""
    others = [own for own in product.sampler.lists if len(own) != len(product.sampler.steps)]
    return [(f"also takes {len(u)} (`fewstep export RUN --lora --steps {len(u)}`), at", str(list(u))) for u in others]


def _load(folder: str) -> str:
    return f'pipe.load_lora_weights("{folder}")'


_WHO = {"diffusers": "diffusers", "kohya": "diffusers", "comfyui": "ComfyUI's rule"}
"""Whose merging of a layout is compared with ours."""


@torch.no_grad()
def _pairs(net: Adapted, layout: str, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """(merged here, fused by `_WHO`) of every weight, over the largest of its layer."""
    ours: Any = diffusers_model(network_of(plain_copy(net)))[1]
    theirs: Any = diffusers_model(network_of(plain_copy(net.base)))[1]
    unhalved(theirs)
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


def _card(
    product: Product,
    net: Adapted,
    usage: str,
    parity: float,
    _: Rows,
    *,
    front: dict[str, str],
    told: Rows,
    comfy: str,
) -> str:
    recipe: Any = product.recipe
    levels = ", ".join(f"{u:.6g}" for u in product.sampler.steps)
    above = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())
    count = sum(v.numel() for v in lora_tensors(net)[0].values())
    return (
        f"---\nlibrary_name: diffusers\ntags: [fewstep, lora, few-step]\n{above}---\n"
        f"# {plain(product.title)}\n\n{plain(recipe.about)}. "
        f"A LoRA set made by fewstep with the method `{recipe.method.name}`.\n\n"
        "| | |\n|---|---|\n"
        f"| rank, alpha | {net.rank}, {net.alpha:g} |\n| parameters | {count} |\n"
        f"| trained at levels u, first to last | {levels} |\n| steps trained | {product.done} |\n"
        f"| fused by diffusers against merged here, largest relative difference of a weight | {parity:.1e} |\n"
        + table(told)
        + f"\n```python\n{usage}\n```\n"
        + (f"\n{comfy}\n" if comfy else "")
    )
