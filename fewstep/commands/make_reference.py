"""`fewstep make-reference`: the statistics of a folder of real images that a preset compares with."""

from __future__ import annotations

from pathlib import Path

from fewstep.config import UserError
from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.eval.tools.make_reference import make


def make_reference(
    folder: Path,
    preset: str,
    out: Path | None,
    extractor_path: Path | None,
    grey_to_colour: bool,
    batch: int,
    size: int | None = None,
    keep_features: bool = False,
) -> tuple[Path, int]:
    """Write the file; returns its path and the number of images. UserError for what does not fit."""
    arguments = [str(folder), "--preset", preset, "--batch", str(batch)]
    arguments += ["--out", str(out)] if out is not None else []
    arguments += ["--extractor-path", str(extractor_path)] if extractor_path is not None else []
    arguments += ["--grey-to-colour"] if grey_to_colour else []
    arguments += ["--size", str(size)] if size is not None else []
    arguments += ["--keep-features"] if keep_features else []
    try:
        path = make(arguments)
    except (ValueError, FileNotFoundError, PermissionError, ModuleNotFoundError, RuntimeError) as error:
        raise UserError(str(error)) from None
    return path, int(FeatureStatistics.load(path).n or 0)
