"""Runs of one update, made in Python: what the examples of the docstrings open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fewstep


def make_runs(where: Path) -> Path:
    """runs/ring and runs/digits in a folder, which is returned."""
    tiny: dict[str, Any] = {"steps": 1, "batch": 8, "ema": []}
    ring = fewstep.load("toy/dmd2", before=[], copy={}, train=tiny)
    no_gan = ["method.gan=null", "discriminator=null", "method.critic.steps=1", "optim={default: {lr: 1e-4}}"]
    digits = fewstep.load("digits-dmd2", no_gan, train=tiny)
    for name, recipe in (("ring", ring), ("digits", digits)):
        fewstep.Trainer(recipe, where / "runs" / name, cpu=True).fit()
    return where
