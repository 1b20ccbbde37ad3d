"""The preset `fd` made ready: which features, and what samples are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.config import UserError
from fewstep.eval.protocol.preset import Preset, ResizeStep
from fewstep.eval.protocol.real import folder_pictures
from fewstep.eval.protocol.reference import Source
from fewstep.files import expanded, read_json
from fewstep.networks.folder import read_latents
from fewstep.networks.scores import HOUSE
from fewstep.recipe.schema import Evaluate

FEATURES = {
    "effnet-lite0": ("effnet-lite0-224", 224),
    "inception": ("inception-2015", 299),
    "dinov2": ("dinov2", 224),
    "clip": ("clip:ViT-B-32", 224),
}
"""Feature networks by the names of `--features`: the extractor and the side of what it takes."""
OWN_WEIGHTS = {
    "dinov2": "the folder of a transformers Dinov2Model",
    "clip": "an open-clip checkpoint of ViT-B-32; `clip:ARCHITECTURE` names another",
}


def fitted(preset: Preset, spec: Evaluate, shape: Sequence[int] | None) -> Preset:
    """`fd` with the features of an evaluation; `shape` of the samples decides which house classifier is meant.

    Raises:
        UserError: features that are not for such samples, or whose weights nothing names.
    """
    name = spec.features
    against = "data" if spec.against == "data" else expanded(spec.against).resolve().name
    preset = replace(preset, reference=replace(preset.reference, name=against))
    if name == "house":
        side = 0 if shape is None or len(shape) != 3 or shape[0] != 1 else shape[-1]
        if side not in HOUSE:
            raise UserError(f"features house: are of grey pictures of 8 x 8 or 28 x 28; these are {list(shape or ())}")
        return replace(preset, extractor=HOUSE[side], size=side, channels=1, chain=[])
    kind = name.partition(":")[0]
    if kind in OWN_WEIGHTS and spec.extractor_path is None:
        raise UserError(
            f"features {name}: needs --extractor-path (evaluate.extractor_path in a recipe): {OWN_WEIGHTS[kind]}"
        )
    extractor, side = (name, 224) if ":" in name else FEATURES[name]
    chain = [ResizeStep("centre-square"), ResizeStep("clean-bicubic", side)]
    return replace(preset, extractor=extractor, chain=chain)


def source_of(recipe: Any, against: str, shape: Sequence[int] | None) -> Source | None:
    """What `against` names: a recipe's own data, a folder of pictures at the samples' size, a statistics file.

    None where there is no recipe whose data it could be.
    """
    if against == "data":
        return None if recipe is None else lambda: data_source(recipe.data.open())
    path = expanded(against)
    if path.suffix == ".npz":
        return lambda: path
    if shape is None or len(shape) != 3:
        raise UserError(f"against {against}: is for pictures; these samples are {list(shape or ())}")
    return lambda: folder_pictures(path, min(shape[-2:]), shape[0])


def data_source(data: Any) -> Any:
    """Pictures that are read one by one where data has them, all samples otherwise."""
    return data.reference() if hasattr(data, "reference") else data.all()


def pipeline_shape(path: Path) -> tuple[int, int, int]:
    """(C, H, W) of the pictures of a diffusers folder, by its configurations. UserError where they do not say."""
    for name in ("unet", "transformer"):
        config = path / name / "config.json"
        if not config.is_file():
            continue
        told = read_json(config)
        side, latents = told.get("sample_size"), read_latents(path / "vae" / "config.json")
        size = [side, side] if isinstance(side, int) else side
        if isinstance(size, list) and len(size) == 2:
            scale = latents.pixels if latents else 1
            channels = 3 if latents else int(told.get("out_channels") or told.get("in_channels") or 3)
            return (3 if channels not in (1, 3) else channels, size[0] * scale, size[1] * scale)
    raise UserError(f"{path}: does not say how large its pictures are; draw them into a folder and give --images FOLDER")
