"""LoRA files in the layout of diffusers: `COMPONENT.LAYER.lora_A.weight`, with rank and scale in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.config import UserError
from fewstep.networks.adapters import Adapted, network_of
from fewstep.networks.weights import PICKLES, rename

NAME = "pytorch_lora_weights.safetensors"
"""The file that diffusers' `load_lora_weights` looks for in a folder."""


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
    return tensors, {"format": "pt", "lora_adapter_metadata": header}


def save_lora(adapted: Adapted, path: Path) -> Path:
    """Write what diffusers' `load_lora_weights` reads."""
    from safetensors.torch import save_file

    tensors, header = lora_tensors(adapted)
    save_file(tensors, path, metadata=header)
    return path


def read_lora(adapted: Adapted, path: Path) -> None:
    """Start an adapter from a LoRA file. Raises UserError naming file, layer and remedy when it does not fit."""
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        old = [p for p in sorted(path.iterdir()) if p.suffix in PICKLES]
        path = old[0] if old and not (path / NAME).is_file() else path / NAME
    if path.suffix in PICKLES and path.is_file():
        to = path.with_suffix(".safetensors")
        raise UserError(
            f"{path}: a LoRA file must be safetensors; a pickle is not opened. Convert it first, then give {to}:\n"
            f"  {rename(path, to)}"
        )
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a LoRA file must be safetensors, such as {NAME}")
    try:
        with safe_open(path, framework="pt") as f:
            found = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  not a dict
            header: dict[str, Any] = json.loads((f.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a LoRA file: {error}") from None
    wanted, _ = lora_tensors(adapted)
    part = next(iter(wanted)).split(".")[0]
    missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or surplus:
        first = f"lacks {missing[0]}" if missing else f"holds {surplus[0]}, which this adapter does not have"
        raise UserError(
            f"{path}: does not fit: it {first} ({len(missing)} missing, {len(surplus)} unknown); set lora.targets to "
            f"the layers of the file ({_ends(found)})"
        )
    for key, value in wanted.items():
        if found[key].shape != value.shape:
            rank = min(found[key].shape[:2])
            raise UserError(
                f"{path}: does not fit: {key} is {list(found[key].shape)}, this adapter has {list(value.shape)}; the "
                f"file's rank seems to be {rank}: set lora.rank to it, or use the LoRA's own base model"
            )
    alpha = header.get(f"{part}.lora_alpha")
    if alpha is not None and float(alpha) != adapted.alpha:
        raise UserError(f"{path}: was trained with alpha {alpha}, not {adapted.alpha}; set lora.alpha to {alpha}")
    prefix, _ = diffusers_model(network_of(adapted.base))
    with torch.no_grad():
        for key, p in adapted.own.items():
            name = key.replace("/", ".").removeprefix(f"{prefix}." if prefix else "")
            p.copy_(found[f"{part}.{name}"])


def _ends(tensors: dict[str, Tensor]) -> str:
    names = {k.split(".lora_")[0].removesuffix(".0").split(".")[-1] for k in tensors if ".lora_" in k}
    return ", ".join(sorted(names)[:8]) or "it names none"
