"""What every way of exporting shares."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fewstep.config import UserError
from fewstep.train.product import Product

PARITY = 1e-4
"""Largest allowed difference between the exported pipeline and fewstep's sampler, images in [-1, 1]."""


@dataclass(frozen=True)
class Exported:
    """Where an export went, how to call it and how well it agrees."""

    folder: Path
    usage: str
    parity: float


@dataclass(frozen=True)
class Way:
    """How a product is going to be written, decided without reading a weight.

    scheduler: the stock class, "" where each network of several has its own or none. write: called with the folder,
    `results` and `shown` as `export`.
    """

    scheduler: str
    write: Callable[..., Exported]


@contextmanager
def aside_of(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when all went well and vanishes otherwise."""
    marks = ("fewstep.json", "steps.json", "classes.json")  # a teacher's folder has none of them
    if folder.exists() and any(folder.iterdir()) and not any((folder / m).is_file() for m in marks):
        raise UserError(f"{folder}: exists and is not an earlier export; choose another folder")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"export: {folder} could not be written: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def facts_of(product: Product) -> dict[str, Any]:
    """What every model card of a student says about its run."""
    assert product.recipe is not None
    method: Any = product.recipe.method
    process: Any = product.net.process
    t = process.grid(torch.tensor(product.sampler.steps, dtype=torch.float64))
    ratio = (process.sigma(t) / process.alpha(t)).tolist()
    return {
        "title": product.title,
        "about": product.recipe.about,
        "method": method.name,
        "cites": ", ".join(f"arXiv {c}" for c in method.cites),
        "calls": len(product.sampler.steps),
        "sigmas": ", ".join(f"{s:.6g}" for s in ratio),
        "done": product.done,
    }
