"""LoRA files of other programs: read in the layer names of diffusers and peft, and written in theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fewstep.config import UserError
from fewstep.networks.weights import shell

LAYOUTS = (
    "diffusers (unet.LAYER.lora_A.weight, .lora.down.weight, .processor.to_q_lora.down.weight), peft "
    "(base_model.model.LAYER...) and kohya (lora_unet_LAYER.lora_down.weight)"
)
_KOHYA = ("lora_unet_", "lora_transformer_")
_WORDS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
_OTHER = {
    "lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", "hada_w": "LoHa", "lokr_w": "LoKr", "oft_": "OFT",
    "lora_embedding_": "LoRA of an embedding",
}  # fmt: skip
"""What stands in the names of tensors that are no plain LoRA."""
_SIDES = (
    (r"\.to_(q|k|v)_lora\.(down|up)\.weight$", r".to_\1.lora.\2.weight"),
    (r"\.to_out_lora\.(down|up)\.weight$", r".to_out.0.lora.\1.weight"),
    (r"\.(?:lora|lora_linear_layer)\.down\.weight$", ".lora_A.weight"),
    (r"\.(?:lora|lora_linear_layer)\.up\.weight$", ".lora_B.weight"),
    (r"\.lora_down\.weight$", ".lora_A.weight"),
    (r"\.lora_up\.weight$", ".lora_B.weight"),
    (r"\.lora_(A|B)\.[^.]+\.weight$", r".lora_\1.weight"),
)


def plain_layout(
    found: Mapping[str, Tensor], model: nn.Module, part: str, said: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(tensors as `PART.LAYER.lora_A.weight`, alphas by layer where the file has any) of a LoRA file.

    Args:
        found: the file's tensors.
        model: the diffusers model whose layers they adapt.
        part: what pipelines call it, "unet" or "transformer".
        said: what messages begin with.

    Raises UserError for text encoders' layers, with the command that leaves them out, and for what is no plain LoRA.
    """
    for name in found:
        kind = next((kind for mark, kind in _OTHER.items() if mark in name), None)
        if kind:
            raise UserError(f"{said}: is no plain LoRA: {name} is of a {kind}; fuse it into the base model instead")
    words = [k for k in found if k.startswith(_WORDS)]
    if words:
        code = (
            "from safetensors.torch import load_file, save_file; "
            f"save_file({{k: v for k, v in load_file({said!r}).items() if not k.startswith({_WORDS!r})}}, {said!r}, "
            "metadata={'format': 'pt'})"
        )
        raise UserError(
            f"{said}: also adapts a text encoder ({words[0]}, {len(words)} tensors), which adapters here do not; fuse "
            f"that part into the encoder's folder, then leave it out of this file:\n  {shell(code)}"
        )
    tensors: dict[str, Tensor] = dict(found)
    if any(k.startswith(_KOHYA) for k in tensors):
        tensors = _from_kohya(tensors, model, part)
    out, alphas = {}, {}
    for key, value in tensors.items():
        name = key.removeprefix("base_model.model.").replace(".processor.", ".")
        for pattern, by in _SIDES:
            name = re.sub(pattern, by, name)
        name = name if name.startswith(f"{part}.") else f"{part}.{name}"
        if name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = float(value)
        else:
            out[name] = value
    return out, alphas


def _from_kohya(found: Mapping[str, Tensor], model: nn.Module, part: str) -> dict[str, Tensor]:
    """Names with dots in place of underscores: the model's own layers tell which; else diffusers' converter is asked."""
    layers = {n.replace(".", "_"): n for n, _ in model.named_modules() if n and "lora_" not in n}
    out = {}
    for key, value in found.items():
        joined, _, tail = key.partition(".")
        name = layers.get(re.sub("^lora_(unet|transformer)_", "", joined))
        if name is None:
            return _by_diffusers(found, model, part)
        out[f"{part}.{name}.{tail}"] = value
    return out


def _by_diffusers(found: Mapping[str, Tensor], model: Any, part: str) -> dict[str, Tensor]:
    """The names of the original repositories (input_blocks, ...), as diffusers reads them; unchanged where it cannot."""
    import diffusers

    wide = getattr(model.config, "addition_embed_type", None) == "text_time"
    kinds = {"UNet2DConditionModel": f"StableDiffusion{'XL' * wide}Pipeline", "FluxTransformer2DModel": "FluxPipeline"}
    pipeline: Any = getattr(diffusers, kinds.get(type(model).__name__, ""), None)
    if pipeline is None:
        return dict(found)
    try:
        told = pipeline.lora_state_dict(dict(found), unet_config=model.config)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return dict(found)
    state, scales = told if isinstance(told, tuple) else (told, None)
    return {**state, **{k: _scalar(v) for k, v in (scales or {}).items()}}


def _scalar(value: Any) -> Tensor:
    import torch

    return torch.as_tensor(float(value))


FORMATS = ("diffusers", "kohya", "comfyui")
"""Layouts that a LoRA file is written in."""


def written_as(layout: str, tensors: Mapping[str, Tensor], alpha: float, part: str) -> dict[str, Tensor]:
    """Tensors of `PART.LAYER.lora_A.weight` in a layout of FORMATS, the alpha beside every layer but in diffusers' own.

    Raises UserError for kohya's names of a transformer's layers, which are those of the original repositories.
    """
    import torch

    if layout == "diffusers":
        return dict(tensors)
    if layout == "kohya" and part != "unet":
        raise UserError(
            "--format kohya: layers of transformers have the original repositories' names there; take comfyui"
        )
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        layer, _, side = key.removeprefix(f"{part}.").rpartition(".lora_")
        name, ends = f"{part}.{layer}", {"A.weight": "lora_A.weight", "B.weight": "lora_B.weight"}
        if part == "unet":
            name, ends = _joined(layer), {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}
        out[f"{name}.{ends[side]}"] = value
        out[f"{name}.alpha"] = torch.tensor(float(alpha))
    return out


def _joined(layer: str) -> str:
    return f"lora_unet_{layer.replace('.', '_')}"


def merged_by_comfyui(found: Mapping[str, Tensor], weights: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """A model's weights with a LoRA file merged by ComfyUI's rule (comfy/lora.py as restated here; it was not run).

    It knows a UNet's layers as lora_unet_LAYER_WITH_UNDERSCORES and a transformer's as transformer.LAYER; a layer without
    alpha counts with 1 in place of alpha / rank. Raises ValueError for a tensor that it would leave out.
    """
    out, used = dict(weights), set()
    for key, weight in weights.items():
        layer = key.removesuffix(".weight")
        name = _joined(layer) if part == "unet" else f"{part}.{layer}"
        sides = ("lora_down", "lora_up") if f"{name}.lora_down.weight" in found else ("lora_A", "lora_B")
        down, up = (found.get(f"{name}.{side}.weight") for side in sides)
        if down is None or up is None or layer == key:
            continue
        alpha = found.get(f"{name}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        out[key] = weight + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        used |= {f"{name}.{side}.weight" for side in sides} | {f"{name}.alpha"}
    if found.keys() - used:
        raise ValueError(f"ComfyUI's rule leaves out {min(found.keys() - used)}")
    return out
