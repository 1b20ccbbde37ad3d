"""The statistics of real images that a preset compares with, made from a folder of them.

``python -m fewstep.eval.tools.make_reference FOLDER --preset coco30k [--grey-to-colour]``

Every image of the folder goes through the preset's own resize chain and feature network; sizes may differ. The file is
written where the preset looks for it, or to --out, which `fewstep eval RUN --against FILE.npz` takes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewstep.eval.features.base import FeatureExtractor, extract
from fewstep.eval.features.extractors import build_extractor
from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.eval.protocol.images import ImageFolder
from fewstep.eval.protocol.preset import Preset, load_preset, locate
from fewstep.eval.protocol.reference import provenance
from fewstep.eval.protocol.resize import Step, apply_chain
from fewstep.files import cache_dir


def folder_statistics(
    folder: ImageFolder, preset: Preset, extractor: FeatureExtractor, batch: int = 32, size: int | None = None
) -> tuple[FeatureStatistics, Tensor]:
    """Statistics and features (N, D) of all images of a folder through the preset's chain.

    `size`: the middle square of every image is first resized to it (Lanczos), as the samples' size.

    Raises:
        ValueError: a file that does not fit, or another number of images than the preset's reference has.
    """
    wanted = preset.reference.images
    if wanted is not None and len(folder.files) != wanted:
        raise ValueError(
            f"{folder.path}: {len(folder.files)} images, the reference of preset {preset.name} is of {wanted}"
        )
    name = preset.reference.name
    statistics = FeatureStatistics(extractor.dim, provenance(name, preset.hash, extractor, len(folder.files)))
    features = extract(extractor, _chained(folder, preset, batch, size))
    statistics.update(features)
    return statistics, features


def _chained(folder: ImageFolder, preset: Preset, batch: int, size: int | None) -> Iterator[Tensor]:
    first = [] if size is None else [Step("centre-square"), Step("pil-lanczos", size)]
    waiting: list[Tensor] = []
    for image in folder.images():
        waiting.append(apply_chain(image[None], [*first, *preset.steps])[0].float())
        if waiting[0].shape != waiting[-1].shape:
            raise ValueError(
                f"{folder.path}: the chain of preset {preset.name} leaves images of different sizes, "
                f"{list(waiting[0].shape)} and {list(waiting[-1].shape)}"
            )
        if len(waiting) == batch:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)


def write_reference(
    folder: Path,
    preset: str,
    *,
    out: Path | None = None,
    extractor_path: Path | None = None,
    grey_to_colour: bool = False,
    size: int | None = None,
    keep_features: bool = False,
    batch: int = 32,
) -> Path:
    """Write the statistics of a folder; returns the file. Raises as `folder_statistics` and `load_preset`.

    Args:
        preset: a shipped preset or a YAML file.
        out: the file; None is where the preset looks for it.
        extractor_path: weights of the preset's feature network.
        grey_to_colour: take grey files in a colour preset.
        size: first resize the middle square of every image to the samples' size.
        keep_features: for KID and precision.
        batch: images of one pass.
    """
    wanted = load_preset(preset)
    if wanted.reference.file is None and (out is None or wanted.reference.kind not in ("data", "against")):
        raise ValueError(f"preset {wanted.name}: its reference is {wanted.reference.kind!r}, there is no file to make")
    either = grey_to_colour or wanted.channels is None
    images = ImageFolder(folder, wanted.channels or 3, any_size=True, grey_to_colour=either)
    if extractor_path is None and wanted.extractor_file is not None:
        extractor_path = locate(wanted.extractor_file, "weights")
    extractor = build_extractor(wanted.extractor, extractor_path)
    statistics, features = folder_statistics(images, wanted, extractor, batch, size)
    where = out or cache_dir("reference") / str(wanted.reference.file and wanted.reference.file.name)
    return statistics.save(where, features.numpy() if keep_features else None)


def make(arguments: Sequence[str] | None = None) -> Path:
    """What the command does; returns the path of the file. Raises as `folder_statistics` and `load_preset`."""
    parser = argparse.ArgumentParser(
        prog="python -m fewstep.eval.tools.make_reference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", required=True, help="a shipped preset or a YAML file")
    parser.add_argument("--out", type=Path, help="file to write; left out: where the preset looks for it")
    parser.add_argument("--extractor-path", type=Path, help="weights of the preset's feature network")
    parser.add_argument("--grey-to-colour", action="store_true", help="take grey files in a colour preset")
    parser.add_argument("--size", type=int, help="first resize the middle square of every image to the samples' size")
    parser.add_argument("--keep-features", action="store_true", help="for KID and precision: 4 bytes x N x D more")
    parser.add_argument("--batch", type=int, default=32, help="images of one pass")
    return write_reference(**vars(parser.parse_args(arguments)))


def main() -> None:
    try:
        path = make()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(f"{path}: statistics of {FeatureStatistics.load(path).n} images")


if __name__ == "__main__":
    main()
