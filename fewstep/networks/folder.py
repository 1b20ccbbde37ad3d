"""A diffusers pipeline folder as it describes itself: which network, which noise schedule, which latents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.config import UserError

_SCALING = {"AutoencoderKL": 0.18215, "AutoencoderDC": 1.0}
"""What diffusers itself takes where a VAE's config says nothing."""


def resolve(path: str) -> Path:
    """A folder; `assets:NAME` is one that ships with fewstep."""
    if path.startswith("assets:"):
        return Path(str(files("fewstep.assets"))) / path.removeprefix("assets:")
    return Path(path).expanduser()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError names the file."""
    try:
        data = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object")
    return data


@dataclass(frozen=True)
class Latents:
    """How a VAE's codes z become the network's x = (z - shift) scale, and how many pixels one latent covers."""

    scale: float
    shift: float
    pixels: int
    channels: int

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """The network's x of a code of the VAE."""
        return (z - self.shift) * self.scale

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """The VAE's code of the network's x."""
        return x / self.scale + self.shift


@dataclass(frozen=True)
class Folder:
    """A pipeline folder, read but not loaded."""

    root: Path
    shown: str
    """How the user named it."""
    component: str
    """unet or transformer."""
    config: Mapping[str, Any]
    """Of the network."""
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any]
    """model_index.json, empty where there is none."""
    latents: Latents | None
    """None: the network works on pixels."""
    dtype: torch.dtype = torch.float32

    @property
    def kind(self) -> str:
        """Class of the network."""
        return str(self.config.get("_class_name"))

    @property
    def scheduler_file(self) -> Path:
        return self.root / "scheduler" / "scheduler_config.json"

    def require_components(self) -> None:
        """UserError for a part of the pipeline that model_index.json names and that is not there."""
        for name, entry in self.index.items():
            named = isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
            if named and not name.startswith("_") and not (self.root / name).is_dir():
                text = "; or set it to [null, null] there and work from cached text embeddings"
                raise UserError(
                    f"teacher {self.shown}: {name}/ is missing, and model_index.json names it ({entry[1]}); copy it "
                    f"from the original pipeline{text if name.startswith(('text_encoder', 'tokenizer')) else ''}"
                )


def read_folder(path: str, dtype: torch.dtype = torch.float32) -> Folder:
    """Read the configs of a pipeline folder. UserError for what is missing or contradictory."""
    root = resolve(path)
    if not root.is_dir():
        raise UserError(
            f"teacher {path}: no such folder; train one with `fewstep run digits-teacher` or give a path"
        )
    component = "transformer" if (root / "transformer").is_dir() else "unet"
    if component == "transformer" and (root / "unet").is_dir():
        raise UserError(f"teacher {path}: has both unet/ and transformer/; which one is meant is not clear")
    schedule = root / "scheduler" / "scheduler_config.json"
    for needed in (root / component / "config.json", schedule):
        if not needed.is_file():
            raise UserError(
                f"teacher {path}: {needed.relative_to(root)} is missing; a diffusers pipeline has it"
            )
    index = root / "model_index.json"
    return Folder(
        root,
        path,
        component,
        read_json(root / component / "config.json"),
        read_json(schedule),
        read_json(index) if index.is_file() else {},
        read_latents(root / "vae" / "config.json"),
        dtype,
    )


def read_latents(path: Path) -> Latents | None:
    """Scaling and shift of a VAE from its config.json, None where there is no file. UserError when ambiguous."""
    if not path.is_file():
        return None
    config = read_json(path)
    kind = config.get("_class_name")
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise UserError(
                f"{path}: {key} is set, which is not supported; only scaling_factor and shift_factor"
            )
    scale = config.get("scaling_factor", _SCALING.get(str(kind)))
    if not isinstance(scale, (int, float)) or not scale > 0:
        raise UserError(
            f"{path}: scaling_factor is {config.get('scaling_factor', 'missing')} and {kind} has no default; add the "
            "factor that the network was trained with"
        )
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if not isinstance(widths, list):
        raise UserError(f"{path}: block_out_channels is missing; it tells how many pixels a latent covers")
    channels = int(config.get("latent_channels", 4))
    return Latents(float(scale), float(config.get("shift_factor") or 0.0), 2 ** (len(widths) - 1), channels)


def conversion(folder: Folder, file: Path) -> str:
    """The command that turns a pickled checkpoint into safetensors."""
    where = file.parent
    code = f"from diffusers import {folder.kind} as M; M.from_pretrained('{where}', use_safetensors=False)"
    return f"python -c \"{code}.save_pretrained('{where}')\""


def load_model(folder: Folder) -> nn.Module:
    """The network of a folder, from safetensors only, complete, in the folder's dtype and eval mode."""
    import diffusers
    from safetensors import SafetensorError

    sub = folder.root / folder.component
    said = f"teacher {folder.shown}"
    weights = sorted(sub.glob("*.safetensors"))
    if not weights:
        pickles = [*sub.glob("*.bin"), *sub.glob("*.ckpt"), *sub.glob("*.pt"), *sub.glob("*.pth")]
        extra = ""
        if pickles:
            extra = f"; {pickles[0].name} is a pickle: convert it with safetensors first:\n  "
            extra += conversion(folder, pickles[0])
        raise UserError(f"{said}: {folder.component}/ has no .safetensors file{extra}")
    _check_whole(folder, weights)
    cls: Any = getattr(diffusers, folder.kind, None)
    if cls is None:
        raise UserError(f"{sub / 'config.json'}: diffusers has no class {folder.kind!r}")
    plain = [w for w in weights if not w.name.partition(".")[2].startswith(("fp16", "bf16"))]
    variant = None if plain else weights[0].name.split(".")[1].partition("-")[0]
    try:
        model, told = cls.from_pretrained(
            sub,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            torch_dtype=folder.dtype,
            variant=variant,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{said}: the weights in {folder.component}/ cannot be loaded: {error}") from None
    # diffusers only warns and leaves what the file lacks at random.
    for kind, what in (("missing_keys", "lack"), ("unexpected_keys", "hold the unknown")):
        if told[kind]:
            raise UserError(
                f"{said}: the weights in {folder.component}/ {what} {sorted(told[kind])[0]} "
                f"({len(told[kind])} in all); they are of another network than {folder.component}/config.json says"
            )
    return model.eval()


def _check_whole(folder: Folder, weights: list[Path]) -> None:
    from safetensors import SafetensorError, safe_open

    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"teacher {folder.shown}: {folder.component}/{file.name} is truncated or damaged "
                f"({file.stat().st_size} bytes): {error}"
            ) from None
