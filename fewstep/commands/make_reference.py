"""`fewstep make-reference`: the statistics of a folder of real images that a preset compares with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.config import UserError
from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.eval.tools.make_reference import write_reference


def make_reference(folder: Path, preset: str, **options: Any) -> tuple[Path, int]:
    """`write_reference`; returns the file's path and the number of images. UserError for what does not fit."""
    try:
        path = write_reference(folder, preset, **options)
    except (ValueError, FileNotFoundError, PermissionError, ModuleNotFoundError, RuntimeError) as error:
        raise UserError(str(error)) from None
    return path, int(FeatureStatistics.load(path).n or 0)
