"""LoRA files: written in the layout of diffusers, rank and scale in the header; read in those of other trainers too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.config import UserError
from fewstep.files import parse_json, read_json, regular
from fewstep.networks import base_mark
from fewstep.networks.adapters import Adapted, network_of, plain_copy
from fewstep.networks.lora_formats import FRONTS, LAYOUTS, plain_layout, written_as
from fewstep.networks.weights import PICKLES, not_finite, rename

NAME = "pytorch_lora_weights.safetensors"
"""The file that diffusers' `load_lora_weights` looks for in a folder."""

PEFT_NAME = "adapter_model.safetensors"
"""Where peft's own `save_pretrained` puts it, with adapter_config.json beside it."""


def diffusers_model(net: nn.Module) -> tuple[str, Any]:
    """The diffusers model inside a network and the path to it, "" for itself. ValueError where there is none."""
    from diffusers import ModelMixin

    for name, m in net.named_modules():
        if isinstance(m, ModelMixin):
            return name, m
    raise ValueError(f"a {type(net).__name__} holds no diffusers model")


def component(model: nn.Module) -> str:
    """What pipelines call such a model: "unet" or "transformer"."""
    return "unet" if "UNet" in type(model).__name__ else "transformer"


def lora_tensors(adapted: Adapted) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of a LoRA file. Raises UserError when adapted layers lie outside the diffusers model."""
    path, model = diffusers_model(network_of(adapted.base))
    inside = f"{path}." if path else ""
    part = component(model)
    tensors = {}
    for key, p in adapted.own.items():
        name = key.replace("/", ".")
        if not name.startswith(inside):
            raise UserError(
                f"the adapter also holds {name}, which is no part of {type(model).__name__}; name the layers "
                "to adapt in lora.targets, or export fused weights"
            )
        tensors[f"{part}.{name.removeprefix(inside)}"] = p.detach().cpu().contiguous().clone()
    modules = sorted({k.removeprefix(f"{part}.").split(".lora_")[0] for k in tensors})
    facts = {"r": adapted.rank, "lora_alpha": adapted.alpha, "target_modules": modules, "bias": "none"}
    header = json.dumps({f"{part}.{k}": v for k, v in facts.items()}, sort_keys=True)
    return tensors, {"format": "pt", "lora_adapter_metadata": header, base_mark.KEY: base_mark.written(model)}


def save_lora(adapted: Adapted, path: Path, layout: str = "diffusers") -> Path:
    """Write what diffusers' `load_lora_weights` reads, or another layout of `lora_formats.FORMATS`."""
    from safetensors.torch import save_file

    tensors, header = lora_tensors(adapted)
    part = component(diffusers_model(network_of(adapted.base))[1])
    if layout != "diffusers":  # which goes by the header; others say their alpha beside every layer
        header = {k: v for k, v in header.items() if k != "lora_adapter_metadata"}
    save_file(written_as(layout, tensors, adapted.alpha, part), path, metadata=header)
    return path


def read_lora(adapted: Adapted, path: Path) -> None:
    """Start an adapter from a LoRA file of diffusers' scripts, peft or kohya.

    Raises UserError naming file, layer and remedy when it does not fit, and for one that was made on another base.
    """
    path = _file_of(path)
    said = str(path)
    found, header = _opened(path)
    if bad := not_finite(found.items()):
        raise UserError(f"{said}: holds NaN or infinity in {bad}; its training diverged, or half precision overflowed")
    wanted, _ = lora_tensors(adapted)
    prefix, model = diffusers_model(network_of(adapted.base))
    part = component(model)
    if other := base_mark.differs(model, header.get(base_mark.KEY)):
        raise UserError(
            f"{said}: is a LoRA of another base: {other}; name its own base as teacher.path, or leave lora.file "
            "out to start anew"
        )
    _check_plain(header, part, said)
    tensors, alphas = plain_layout(found, model, part, said)
    _check_names(tensors, wanted, said)
    for key, value in wanted.items():
        given = tensors[key]
        # Linear layers are saved as convolutions of one pixel by some, and the other way round.
        if given.shape != value.shape and _flat(given) == _flat(value):
            tensors[key] = given = given.reshape(value.shape)
        if given.shape != value.shape:
            rank = min(given.shape[:2])
            raise UserError(
                f"{said}: does not fit: {key} is {list(given.shape)}, this adapter has {list(value.shape)}; the "
                f"file's rank seems to be {rank}: set lora.rank to it, or use the LoRA's own base model"
            )
    _check_alpha(adapted, tensors, alphas, header, part, said)
    with torch.no_grad():
        for key, p in adapted.own.items():
            name = key.replace("/", ".").removeprefix(f"{prefix}." if prefix else "")
            p.copy_(tensors[f"{part}.{name}"])


def with_lora(net: nn.Module, source: Path | Adapted, scale: float = 1.0, said: str = "the adapter") -> nn.Module:
    """A copy of a denoiser with `scale` times a LoRA's update in its weights, whichever base that was made on.

    So a base's adapter is used on a student of the same shapes (control transfer, arXiv 2503.10637). They add up in any
    order. source: a file, or an adapter, which messages call `said`. UserError as `read_lora`, but for the base, and
    for layers that the network has not or in another shape.
    """
    twin = plain_copy(net)
    if isinstance(source, Adapted):
        found, facts = lora_tensors(source)
        header = parse_json(facts["lora_adapter_metadata"], said)
    else:
        path = _file_of(source)
        said = str(path)
        found, header = _opened(path)
    if bad := not_finite(found.items()):
        raise UserError(f"{said}: holds NaN or infinity in {bad}; its training diverged, or half precision overflowed")
    _, model = diffusers_model(network_of(twin))
    part = component(model)
    _check_plain(header, part, said)
    tensors, alphas = plain_layout(found, model, part, said)
    downs = {k.removesuffix(".lora_A.weight"): v for k, v in tensors.items() if k.endswith(".lora_A.weight")}
    ups = {k.removesuffix(".lora_B.weight"): v for k, v in tensors.items() if k.endswith(".lora_B.weight")}
    if not downs or set(downs) != set(ups) or len(tensors) != 2 * len(downs):
        raise UserError(
            f"{said}: holds no pairs of lora_A and lora_B, and nothing else, that can be told; read are {LAYOUTS}"
        )
    if header.get(f"{part}.alpha_pattern") or header.get(f"{part}.rank_pattern"):
        raise UserError(f"{said}: its layers have ranks or alphas of their own; fuse it into the base model instead")
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, down in downs.items():
            layer = name.removeprefix(f"{part}.")
            weight = weights.get(f"{layer}.weight")
            if weight is None:
                raise UserError(
                    f"{said}: adapts {layer}, which this {type(model).__name__} has not; it is of another model"
                )
            if ups[name].flatten(1).shape[1] != len(down):
                raise UserError(
                    f"{said}: {name} is of rank {len(down)} in lora_A {list(down.shape)} and of another in lora_B "
                    f"{list(ups[name].shape)}; the file is damaged: save it again"
                )
            alpha = alphas.get(name, header.get(f"{part}.lora_alpha", len(down)))
            update = (ups[name].flatten(1).float() @ down.flatten(1).float()) * (scale * alpha / len(down))
            if update.numel() != weight.numel() or len(update) != len(weight):
                raise UserError(
                    f"{said}: adapts {layer} as {list(update.shape)}, here it is {list(weight.shape)}; it is of another "
                    "model"
                )
            weight.add_(update.reshape(weight.shape).to(weight))
    return twin


def _check_plain(header: Mapping[str, Any], part: str, said: str) -> None:
    for key in ("use_dora", "use_rslora"):
        if header.get(f"{part}.{key}"):
            raise UserError(
                f"{said}: was trained with {key}, which is not supported; fuse it into the base model instead"
            )


def _file_of(path: Path) -> Path:
    """The safetensors file that a path means; UserError for a pickle, with the command that converts it."""
    if path.is_dir():
        old = [p for p in sorted(path.iterdir()) if p.suffix in PICKLES]
        safe = next((path / n for n in (NAME, PEFT_NAME) if (path / n).is_file()), None)
        path = safe or (old[0] if old else path / NAME)
    if path.suffix in PICKLES and path.is_file():
        to = path.with_suffix(".safetensors")
        raise UserError(
            f"{path}: a LoRA file must be safetensors; a pickle is not opened. Convert it first, then give {to}:\n"
            f"  {rename(path, to)}"
        )
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a LoRA file must be safetensors, such as {NAME}")
    return path


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, what the file or peft's adapter_config.json beside it says of them by `PART.KEY`)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(regular(path), framework="pt") as f:
            found = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  not a dict
            facts = f.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a LoRA file: {error}") from None
    if not found:
        raise UserError(f"{path}: holds no tensors; a LoRA file has two for each layer: {LAYOUTS}")
    header = parse_json(facts.get("lora_adapter_metadata", "{}"), f"{path}: lora_adapter_metadata")
    if not isinstance(header, dict):
        raise UserError(f"{path}: cannot be read as a LoRA file: lora_adapter_metadata is no JSON object")
    header = _facts(header, f"{path}: lora_adapter_metadata")
    if base_mark.KEY in facts:
        header[base_mark.KEY] = parse_json(facts[base_mark.KEY], f"{path}: {base_mark.KEY}")
    beside = path.with_name("adapter_config.json")
    if path.name == PEFT_NAME and beside.is_file():
        header |= _facts(read_json(beside), str(beside))
    return found, header


def _facts(told: Mapping[str, Any], said: str) -> dict[str, Any]:
    """What a header says of a network, by `PART.KEY` of either part; UserError for an alpha that is no number.

    Pipelines write their own part before each key and a model's `save_lora_adapter` none; a file is of one network.
    """
    fronts = next((f for f in FRONTS if any(k.startswith(f) for k in told)), "")
    own = {k.removeprefix(fronts): v for k, v in told.items() if k.startswith(fronts)}
    alpha = own.get("lora_alpha")
    if alpha is None:
        own.pop("lora_alpha", None)
    elif isinstance(alpha, bool) or not isinstance(alpha, int | float) or not isfinite(alpha):
        raise UserError(f"{said}: {fronts}lora_alpha is {alpha!r}; it must be a number, such as 16")
    return {f"{part}.{k}": v for part in ("unet", "transformer") for k, v in own.items()}


def _check_names(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], said: str) -> None:
    missing, surplus = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if not missing and not surplus:
        return
    ends = _ends(tensors)
    if not ends:
        other = f", but {surplus[0]}" if surplus else ""
        raise UserError(f"{said}: holds no layer of a LoRA that can be told{other}; read are {LAYOUTS}")
    first = f"lacks {missing[0]}" if missing else f"holds {surplus[0]}, which this adapter does not have"
    raise UserError(
        f"{said}: does not fit: it {first} ({len(missing)} missing, {len(surplus)} unknown); set lora.targets to "
        f"the layers of the file ({ends})"
    )


def _check_alpha(
    adapted: Adapted, names: Iterable[str], alphas: Mapping[str, float], header: Mapping[str, Any], part: str, said: str
) -> None:
    """UserError unless the file's alpha is the adapter's; a layer that says none has its rank, as kohya has it."""
    told = header.get(f"{part}.lora_alpha")
    silent = float(adapted.rank if told is None else told)
    by_alpha = {alphas.get(layer, silent): layer for layer in (n.partition(".lora_")[0] for n in names)}
    if len(by_alpha) > 1 or header.get(f"{part}.alpha_pattern"):
        two = " and ".join(
            f"{layer} {a}{'' if layer in alphas or told is not None else ' (its rank, for it names none)'}"
            for a, layer in sorted(by_alpha.items())[:2]
        )
        which = f" ({two})" if len(by_alpha) > 1 else ""
        raise UserError(
            f"{said}: its layers have different alphas{which}, which one adapter cannot have; fuse it instead"
        )
    alpha = next(iter(by_alpha))
    if alpha != adapted.alpha:
        how = "was trained with" if told is not None or alphas else "names no alpha, which means that of its rank,"
        raise UserError(f"{said}: {how} alpha {alpha}, not {adapted.alpha}; set lora.alpha to {alpha}")


def _flat(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape[:2]) if t.ndim == 4 and tuple(t.shape[2:]) == (1, 1) else tuple(t.shape)


def _ends(tensors: Mapping[str, Tensor]) -> str:
    names = {k.split(".lora_")[0].removesuffix(".0").split(".")[-1] for k in tensors if ".lora_" in k}
    return ", ".join(sorted(names)[:8])
