"""How a student's stock pipeline is called: its class, and what goes beside a prompt as its teacher embedded it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fewstep.algebra.condition import checked
from fewstep.export.base import Stock
from fewstep.export.card import Code
from fewstep.export.image_to_image import PIPELINES
from fewstep.export.picture import IF_PIPELINES
from fewstep.networks.folder import Folder, part_of
from fewstep.train.product import Product


def pipeline_name(source: Folder, wrapper: Any, begins: bool = False) -> str:
    """The stock pipeline of a student: its teacher's, or the one that hands on a picture, or begins with one."""
    name = str(wrapper.pipeline if wrapper.image_channels else source.index["_class_name"])
    return PIPELINES[name] if begins else name


_DEFAULTS: dict[str, dict[str, Any]] = {
    "SanaPipeline": {"complex_human_instruction": None},
    "SanaVideoPipeline": {"complex_human_instruction": None, "use_resolution_binning": False},
    "PixArtAlphaPipeline": {"clean_caption": False},
    "PixArtSigmaPipeline": {"clean_caption": False},
    **{name: {"clean_caption": False} for name in IF_PIPELINES},
}
"""What pipelines do to a prompt unless told not to, and their `encode_prompt`, which embeds for training, does not."""


def settings_of(product: Product, source: Folder, wrapper: Any) -> dict[str, Any]:
    """How the student's pipeline is called beside prompt and levels: as its teacher's embeddings and sizes were."""
    example = checked(wrapper.example(1), wrapper.wanted, wrapper.takes, wrapper.pipeline)
    embedded = wrapper.arguments(example, wrapper.sample_size()).get("guidance_scale")
    known = embedded if wrapper.guidance is None else wrapper.guidance
    settings = dict(wrapper.plain) if embedded is None else {"guidance_scale": float(known)}
    name = pipeline_name(source, wrapper)
    size = tuple(product.shape[1:])
    settings |= _DEFAULTS.get(name, {}) | wrapper.of_size(size)
    known_size = source.latents is not None or name in IF_PIPELINES
    if "label" not in wrapper.needs and known_size and size != tuple(wrapper.sample_size()):
        scale = source.latents.pixels if source.latents else 1
        settings |= {"height": size[-2] * scale, "width": size[-1] * scale}
    encoder: Any = getattr(getattr(product.recipe, "data", None), "encoder", None)
    if getattr(encoder, "name", None) == "pipeline" and encoder.length is not None:
        settings["max_sequence_length"] = encoder.length
    return settings


def call_of(product: Product, source: Folder, wrapper: Any, stock: Stock) -> dict[str, Any]:
    """What the pipeline is called with for an example."""
    return {**what_of(product, source, wrapper), **stock.call, **settings_of(product, source, wrapper)}


def what_of(product: Product, source: Folder, wrapper: Any) -> dict[str, Any]:
    """What an example is made of: a class, a prompt or zeros of embeddings, nothing beside a picture."""
    if wrapper.picture is not None and not product_has_text(product):
        return {}
    if "label" in wrapper.needs:
        return {"class_labels": [product.example]}
    return embeddings_of(product, source, wrapper) or {"prompt": "a red fox in the snow"}


def embeddings_of(product: Product, source: Folder, wrapper: Any) -> dict[str, Code]:
    """Zeros for what the pipeline of a student of cached prompts is given of one; {} where it has a text encoder."""
    encoder: Any = getattr(getattr(product.recipe, "data", None), "encoder", None)
    reads = any(k.startswith("text_encoder") and part_of(v) for k, v in source.index.items())
    if reads or getattr(encoder, "name", None) != "cached" or wrapper.picture is not None:
        return {}
    example = dict(checked(wrapper.example(1), wrapper.wanted, wrapper.takes, wrapper.pipeline))
    example["text"] = example["text"].new_zeros(1, encoder.length or 1, example["text"].shape[2])
    given = wrapper.arguments(example, wrapper.sample_size())
    return {k: Code(f"torch.zeros{tuple(v.shape)}") for k, v in given.items() if isinstance(v, Tensor)}


def product_has_text(product: Product) -> bool:
    """Whether the data that a product was trained on have captions or prompts."""
    return getattr(getattr(product.recipe, "data", None), "encoder", None) is not None
