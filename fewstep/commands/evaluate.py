"""`fewstep eval` by the recipe's own metric."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fewstep.commands.measure import Measured, measure
from fewstep.commands.report import table
from fewstep.recipe.schema import Evaluate
from fewstep.train.product import open_product


def evaluate(
    path: Path, steps: int | None, samples: int | None, seed: int | None, any_steps: bool
) -> Measured:
    """`fewstep eval`: measure a run, an export or a diffusers folder."""
    product = open_product(path).with_steps(steps, any_steps)
    spec = product.recipe.evaluate if product.recipe else Evaluate()
    spec = spec or Evaluate()
    changes = {k: v for k, v in (("samples", samples), ("seed", seed)) if v is not None}
    row, _ = measure(product, replace(spec, **changes))
    table([row])
    return row
