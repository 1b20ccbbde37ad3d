"""LoRA files of other programs: read in the layer names of diffusers and peft, and written in theirs."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.config import UserError
from fewstep.networks.weights import shell
from fewstep.networks.wrapped import WRAPPERS, unwrap, why

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

FRONTS = ("unet.", "transformer.", "diffusion_model.", "model.diffusion_model.")
"""What stands before a layer's name; pipelines call the network by the first two, ComfyUI by the others."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def plain_layout(
    found: Mapping[str, Tensor], model: nn.Module, part: str, said: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(tensors as `PART.LAYER.lora_A.weight`, alphas by layer where the file has any) of a LoRA file.

    Args:
        found: the file's tensors.
        model: the diffusers model whose layers they adapt.
        part: what pipelines call it, "unet" or "transformer".
        said: what messages begin with.

    Raises UserError for text encoders' layers, with the command that leaves them out, for names as inside a wrapper, with
    the one that takes it off, for a layer that is there twice, and for what is no plain LoRA.
    """
    for name in found:
        kind = next((kind for mark, kind in _OTHER.items() if mark in name), None)
        if kind:
            raise UserError(f"{said}: is no plain LoRA: {name} is of a {kind}; fuse it into the base model instead")
    words = [k for k in found if k.startswith(_WORDS)]
    if words:
        command = unwrap([Path(said)], f"[(k, k) for k in ks if not k.startswith({_WORDS!r})]")
        raise UserError(
            f"{said}: also adapts a text encoder ({words[0]}, {len(words)} tensors), which adapters here do not; fuse "
            f"that part into the encoder's folder, then leave it out of this file:\n  {shell(command)}"
        )
    layers = {n for n, _ in model.named_modules() if n and "lora_" not in n}
    _refuse_wrapped(found, layers, said)
    out: dict[str, Tensor] = {}
    alphas, keys = {}, dict[str, str]()
    for given, (key, value) in _from_kohya(found, model, part).items():
        name = _named(key, layers)
        name = name if name.startswith(f"{part}.") else f"{part}.{name}"
        if name in keys:
            raise UserError(
                f"{said}: holds {_layer(name)} twice, as {keys[name]} and as {given}, and nothing says which counts; "
                "leave one out of the file"
            )
        keys[name] = given
        if name.endswith(".alpha"):
            if value.numel() != 1 or value.is_complex():
                raise UserError(f"{said}: {given} has the shape {list(value.shape)}; an alpha is one number")
            alphas[name.removesuffix(".alpha")] = float(value)
        else:
            out[name] = _checked(value, name, given, said)
    return out, alphas


def _named(key: str, layers: Collection[str]) -> str:
    """A key with its sides as peft has them, and without what stands before a layer of the network."""
    name = key.removeprefix("base_model.model.").replace(".processor.", ".")
    for pattern, by in _SIDES:
        name = re.sub(pattern, by, name)
    if _layer(name) not in layers:
        bare = (name.removeprefix(front) for front in FRONTS if name.startswith(front))
        name = next((n for n in bare if _layer(n) in layers), name)
    return name


def _layer(name: str) -> str:
    return name.removesuffix(".alpha").partition(".lora_")[0]


def _checked(value: Tensor, name: str, given: str, said: str) -> Tensor:
    """A tensor of a pair, which is a matrix or a convolution's; UserError where it is none that can be computed with."""
    if not name.endswith((".lora_A.weight", ".lora_B.weight")):
        return value
    if value.dtype not in _DTYPES:
        raise UserError(
            f"{said}: {given} is {str(value.dtype).removeprefix('torch.')}; a LoRA's tensors are float32, float16 or "
            "bfloat16: save it so again"
        )
    if value.ndim < 2 or not value.numel():
        raise UserError(
            f"{said}: {given} has the shape {list(value.shape)}; a LoRA's tensors are [rank, inputs] and [outputs, "
            "rank], with a rank of at least 1"
        )
    return value


def _refuse_wrapped(found: Mapping[str, Tensor], layers: Collection[str], said: str) -> None:
    """UserError, with the command that takes it off, where every name that a wrapper has left is else one of a layer."""
    words = "|".join(WRAPPERS)
    kohya = "|".join(f"(?<={k})" for k in _KOHYA)
    pattern = f"(?:^|(?<=[.]))(?:(?:{words})[.])+|(?:{kohya})(?:(?:{words})_)+"
    joined = {n.replace(".", "_") for n in layers}

    def known(key: str) -> bool:
        front = next((k for k in _KOHYA if key.startswith(k)), None)
        return key.partition(".")[0][len(front) :] in joined if front else _layer(_named(key, layers)) in layers

    strange = {k: re.sub(pattern, "", k) for k in found if not known(k)}
    wrapped = {k: bare for k, bare in strange.items() if bare != k and known(bare)}
    if not wrapped:
        return
    first = min(wrapped)
    mark = "".join(re.findall(pattern, first))
    by_name: dict[str, list[str]] = {}
    for key in sorted(found):
        by_name.setdefault(wrapped.get(key, key), []).append(key)
    if both := next((keys for keys in by_name.values() if len(keys) > 1), None):
        layer = _layer(wrapped.get(both[0], both[0]))
        raise UserError(
            f"{said}: holds {layer} twice, as {both[0]} and as {both[1]}, and nothing says which counts; leave one out "
            "of the file"
        )
    code = unwrap([Path(said)], f"[(re.sub({pattern!r}, '', k), k) for k in ks]")
    told = why(".".join(re.findall(words, mark)))
    raise UserError(
        f"{said}: its layers are named as inside a wrapper, with {mark!r} in {first}; {told}. Write them under their own "
        f"names:\n  {shell(f'import re; {code}')}"
    )


def _from_kohya(found: Mapping[str, Tensor], model: nn.Module, part: str) -> dict[str, tuple[str, Tensor]]:
    """{key: (name, tensor)}, dots in place of kohya's underscores.

    The model's own layers tell which; else diffusers' converter is asked.
    """
    layers = {n.replace(".", "_"): n for n, _ in model.named_modules() if n and "lora_" not in n}
    out = {}
    for key, value in found.items():
        joined, _, tail = key.partition(".")
        name = layers.get(re.sub("^lora_(unet|transformer)_", "", joined)) if joined.startswith(_KOHYA) else None
        if name is None and joined.startswith(_KOHYA):
            return {k: (k, v) for k, v in _by_diffusers(found, model, part).items()}
        out[key] = (key if name is None else f"{part}.{name}.{tail}", value)
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
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return dict(found)
    state, scales = told if isinstance(told, tuple) else (told, None)
    return {**state, **{k: _scalar(v) for k, v in (scales or {}).items()}}


def _scalar(value: Any) -> Tensor:
    return torch.as_tensor(float(value))


FORMATS = ("diffusers", "kohya", "comfyui")
"""Layouts that a LoRA file is written in."""


def written_as(layout: str, tensors: Mapping[str, Tensor], alpha: float, part: str) -> dict[str, Tensor]:
    """Tensors of `PART.LAYER.lora_A.weight` in a layout of FORMATS, the alpha beside every layer but in diffusers' own.

    Raises UserError for kohya's names of a transformer's layers, which are those of the original repositories.
    """
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
