"""A diffusers pipeline folder as it describes itself: which network, which noise schedule, which latents."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.config import Absent, UserError
from fewstep.files import expanded, read_json
from fewstep.networks import hub, single_file
from fewstep.networks.weights import load_part, refuse_pickles, refuse_variants

_SCALING = {"AutoencoderKL": 0.18215, "AutoencoderDC": 1.0}
"""What diffusers itself takes where a VAE's config says nothing."""

_WHITENED = ("AutoencoderKLQwenImage", "AutoencoderKLWan")
"""VAEs whose codes are scaled by a mean and a deviation of each channel, and by nothing else."""

_VIDEOS = ("AutoencoderKLHunyuanVideo",)
"""VAEs of videos whose codes are scaled by one factor."""

_PICTURES = ("AutoencoderKLQwenImage",)
"""VAEs of videos whose networks work on pictures: the one frame of a code is left out of x."""

_ONCE = {"Transformer2DModel": ("DiTTransformer2DModel", "PixArtTransformer2DModel")}
"""Classes of an index from before they were split, which diffusers opens as what the network's config says."""


def part_of(entry: Any) -> bool:
    """Whether an entry of model_index.json names a part of the pipeline; others are settings, [null, null] is none."""
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)


def resolve(path: str) -> Path:
    """A folder; `assets:NAME` is one that ships with fewstep, `org/name[@revision]` one in the hub's cache."""
    repo = hub.repository(path)
    return (hub.cached(repo) if repo else None) or expanded(path)


def number(
    config: Mapping[str, Any],
    key: str,
    default: float,
    where: str,
    *,
    positive: bool = True,
    whole: bool = False,
) -> float:
    """A number of a config, `default` where it has no such key. UserError naming file and key for anything else."""
    value = config.get(key, default)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or (positive and value <= 0) or (whole and value != int(value)):
        kind = " ".join(w for w, on in (("positive", positive), ("whole", whole)) if on)
        raise UserError(
            f"{where}: {key} is {json.dumps(value)}; it must be a {f'{kind} ' if kind else ''}number, the one that the "
            "network was trained with"
        )
    return float(value)


_FLOATS = ("norm_eps", "dropout", "eps", "resnet_eps", "mid_block_scale_factor", "scaling_factor", "sampling_eps")


def check_network_config(config: Mapping[str, Any], where: str) -> None:
    """UserError for values that build a network and fail in its first call: no number, or null within a list."""
    for key, value in config.items():
        number_asked = key in _FLOATS and value is not None
        wrong = number_asked and (not isinstance(value, int | float) or isinstance(value, bool))
        if wrong or (isinstance(value, list) and None in value):
            asked = "a number" if wrong else "a list without null"
            raise UserError(f"{where}: {key} is {json.dumps(value)[:60]}; it must be {asked}")


@dataclass(frozen=True)
class Latents:
    """How a VAE's codes z become the network's x, and how many pixels one cell of x covers.

    x = (z - shift) scale, or (z - mean) / std scale by channel where the VAE has these.
    """

    scale: float
    shift: float
    pixels: int
    channels: int
    """Of x."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    frames: bool = False
    """The VAE's codes are videos (b, c, f, h, w)."""
    pictures: bool = False
    """x has no frames all the same."""
    patch: int = 1
    """Codes along the side of one cell of x; their channels are those of x then. Mean and deviation are of x (FLUX.2)."""

    def of_weights(self, vae: Any) -> Latents:
        """These latents with mean and deviation from a VAE's weights where they are there and not in its config."""
        if self.patch == 1:
            return self
        std = (vae.bn.running_var.double() + vae.config.batch_norm_eps).sqrt()
        return replace(self, mean=tuple(vae.bn.running_mean.tolist()), std=tuple(std.tolist()))

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """The network's x of a code of the VAE."""
        z = nn.functional.pixel_unshuffle(z, self.patch) if self.patch > 1 else z
        mean, factor = self._of(z)
        x = (z - mean) * factor
        return x.squeeze(2) if self.pictures else x

    def spread(self, deviation: torch.Tensor) -> torch.Tensor:
        """The deviation of x for that of a code."""
        deviation = nn.functional.pixel_unshuffle(deviation, self.patch) if self.patch > 1 else deviation
        x = deviation * self._of(deviation)[1]
        return x.squeeze(2) if self.pictures else x

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """The VAE's code of the network's x."""
        z = x.unsqueeze(2) if self.pictures else x
        mean, factor = self._of(z)
        z = z / factor + mean
        return nn.functional.pixel_shuffle(z, self.patch) if self.patch > 1 else z

    def _of(self, z: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """(what is taken from z, what the rest is multiplied by)."""
        if self.mean is None or self.std is None:
            return self.shift, self.scale
        sides = (1, -1, *(1,) * (z.ndim - 2))
        return z.new_tensor(self.mean).view(sides), self.scale / z.new_tensor(self.std).view(sides)

    def said(self) -> str:
        """In words, for check-teacher."""
        how = f"x = (z - {self.shift:g}) * {self.scale:g}"
        if self.patch > 1:
            how = f"x are {self.patch} x {self.patch} codes, whitened by the VAE's batch norm"
        if self.mean is not None:
            how = "x = (z - mean) / std of each channel" + (f" * {self.scale:g}" if self.scale != 1 else "")
        return f"{how}, {self.pixels} pixels a latent"


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
    dtype: torch.dtype = torch.float32

    @cached_property
    def latents(self) -> Latents | None:
        """None: the network works on pixels. UserError, on first use, for a VAE's config that does not say."""
        return read_latents(self.root / "vae" / "config.json")

    @property
    def kind(self) -> str:
        """Class of the network."""
        return str(self.config.get("_class_name"))

    @property
    def scheduler_file(self) -> Path:
        return self.root / "scheduler" / "scheduler_config.json"

    def require_components(self, text: bool = True) -> None:
        """UserError for a part that model_index.json names and that is not there, or only as a pickle or half precision.

        Args:
            text: also the text encoders and tokenizers, without which cached embeddings can train.
        """
        for name, entry in self.index.items():
            named = part_of(entry)
            words = name.startswith(("text_encoder", "tokenizer"))
            if not named or name.startswith("_") or (words and not text):
                continue
            if not (self.root / name).is_dir():
                other = "; or set it to [null, null] there and name a folder that has it in data.encoder.path"
                raise UserError(
                    f"teacher {self.shown}: {name}/ is missing, and model_index.json names it ({entry[1]}); copy it "
                    f"from the original pipeline{other if words else ''}{hub.mend(self.root)}"
                )
            # The network's own is for its wrapper to read.
            if name != self.component:
                part = (self.root / name, f"teacher {self.shown}", str(entry[0]), str(entry[1]))
                refuse_pickles(*part)
                refuse_variants(*part)

    def require_agreement(self) -> None:
        """UserError for a part whose own config names another class than model_index.json, which diffusers goes by."""
        for name, entry in self.index.items():
            file = self.root / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
            if name.startswith("_") or not (part_of(entry) and file.is_file()):
                continue
            own = read_json(file).get("_class_name")
            if own is None or own == entry[1] or own in _ONCE.get(str(entry[1]), ()):
                continue
            raise UserError(
                f"teacher {self.shown}: model_index.json names {entry[1]} as its {name}, and {name}/{file.name} is of "
                f"{own}; diffusers opens the first. Write the class that the network was trained with into both"
            )

    def require_pipeline(self, stock: str) -> None:
        """UserError for a model_index.json whose class is no pipeline of diffusers.

        Args:
            stock: a class that its network runs in, for the message.
        """
        import diffusers

        if not self.index:
            return
        kind = self.index.get("_class_name")
        cls = getattr(diffusers, kind, None) if isinstance(kind, str) else None
        # Without transformers, diffusers puts a stand-in with _backends in a pipeline's place.
        known = isinstance(cls, type) and (issubclass(cls, diffusers.DiffusionPipeline) or hasattr(cls, "_backends"))
        if not known:
            raise UserError(
                f"{self.root / 'model_index.json'}: _class_name {kind!r} is no pipeline of diffusers, and an export is "
                f"one; write the class that the folder was made for, such as {stock!r}"
            )


def read_folder(path: str, dtype: torch.dtype = torch.float32) -> Folder:
    """Read the configs of a pipeline folder. UserError for what is missing or contradictory."""
    root = resolve(path)
    if root.is_file():
        raise UserError(single_file.refusal(root, path))
    if not root.is_dir():
        digits = "; train one with `fewstep run digits-teacher`" if "digits" in path else ""
        hint = hub.hint(path) or digits or "; give the path of a diffusers pipeline folder"
        raise Absent(f"teacher {path}: no such folder{hint}")
    component = "transformer" if (root / "transformer").is_dir() else "unet"
    if component == "transformer" and (root / "unet").is_dir():
        raise UserError(f"teacher {path}: has both unet/ and transformer/; which one is meant is not clear")
    schedule = root / "scheduler" / "scheduler_config.json"
    for needed in (root / component / "config.json", schedule):
        if not needed.is_file():
            told = "a diffusers pipeline has it"
            raise UserError(f"teacher {path}: {needed.relative_to(root)} is missing; {told}{hub.mend(root)}")
    index = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
    named = index.get("scheduler")
    # A config without a class is opened as the index says, which is the one that diffusers goes by.
    given = {"_class_name": named[1]} if isinstance(named, list) and len(named) == 2 and named[0] else {}
    return Folder(
        root,
        path,
        component,
        read_json(root / component / "config.json"),
        given | read_json(schedule),
        index,
        dtype,
    )


def read_latents(path: Path) -> Latents | None:
    """Scaling and shift of a VAE from its config.json, None where there is no file. UserError when ambiguous."""
    if not path.is_file():
        return None
    config = read_json(path)
    kind = config.get("_class_name")
    mean, std = (_statistics(config, key, str(path)) for key in ("latents_mean", "latents_std"))
    if (mean is None) != (std is None) or (mean is None and kind in _WHITENED):
        lacks = "latents_mean" if mean is None else "latents_std"
        raise UserError(f"{path}: {lacks} is missing; give both latents_mean and latents_std, as the network was trained")
    if kind == "AutoencoderKLFlux2":
        return patches_of(config)
    if kind in _WHITENED:
        return _whitened(config, mean, std)
    if config.get("scaling_factor") is None and ("scaling_factor" in config or kind not in _SCALING):
        raise UserError(
            f"{path}: scaling_factor is {config.get('scaling_factor', 'missing')} and {kind} has no default; add the "
            "factor that the network was trained with"
        )
    scale = number(config, "scaling_factor", _SCALING.get(str(kind), 1.0), str(path))
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if not isinstance(widths, list):
        raise UserError(f"{path}: block_out_channels is missing; it tells how many pixels a latent covers")
    channels = int(number(config, "latent_channels", 4, str(path), whole=True))
    if any(given is not None and len(given) != channels for given in (mean, std)):
        raise UserError(f"{path}: latents_mean and latents_std need a value for each of the {channels} latent_channels")
    # diffusers writes null for a VAE without a shift.
    given = {k: v for k, v in config.items() if v is not None}
    shift = number(given, "shift_factor", 0.0, str(path), positive=False)
    return Latents(scale, shift, 2 ** (len(widths) - 1), channels, mean, std, frames=kind in _VIDEOS)


def _statistics(config: Mapping[str, Any], key: str, where: str) -> tuple[float, ...] | None:
    """Numbers of a config by channel, None where there are none."""
    values = config.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: {key} is {json.dumps(values)[:60]}; it must be a list of a number for each channel")
    return tuple(number({key: v}, key, 0.0, where, positive=key == "latents_std") for v in values)


def patches_of(config: Mapping[str, Any]) -> Latents:
    """Of an AutoencoderKLFlux2: 2 x 2 codes are one cell, which a batch norm in the VAE's weights whitens."""
    widths, channels = config.get("block_out_channels"), config.get("latent_channels", 32)
    return Latents(1.0, 0.0, 2 ** len(widths or [0] * 4), 4 * int(channels), patch=2)


def _whitened(config: Mapping[str, Any], mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Latents:
    assert mean is not None
    kind = str(config.get("_class_name"))
    halvings = config.get("temperal_downsample")  # diffusers' spelling
    pixels = config.get("scale_factor_spatial") or 2 ** len(halvings if isinstance(halvings, list) else [0] * 3)
    return Latents(1.0, 0.0, int(pixels), len(mean), mean, std, frames=True, pictures=kind in _PICTURES)


def load_model(folder: Folder) -> nn.Module:
    """The network of a folder, from safetensors only, complete, in the folder's dtype and eval mode."""
    return load_part(folder.root / folder.component, f"teacher {folder.shown}", folder.kind, folder.dtype)
