"""What a recipe's training and samples cost on a machine at rest, for rows of the leaderboard made beside other work."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from fewstep.commands.compare.budget import Accounted, with_lengths
from fewstep.commands.judge import judge_of
from fewstep.commands.sources import BATCH, of_product
from fewstep.eval.protocol.latency import seconds_per_1000
from fewstep.files import commit
from fewstep.recipe.schema import Recipe
from fewstep.train.product import product_of

TIMED = 24
"""Updates of each stage that are timed beside its first, which may build a bank of pairs and is counted once."""


def pace(recipe: Recipe) -> dict[str, Any]:
    """Processor seconds of the whole training, checkpoints left out, and seconds of 1,000 samples.

    They are those of a few updates and of the student after them: what a network costs does not depend on its weights.
    """
    stages = recipe.stages()
    steps = [min(stage.steps, TIMED + 1) for stage in stages]
    spent = [0.0]
    account = Accounted(with_lengths(recipe, steps), None, watch=lambda a: spent.append(a.spent.cpu_seconds))
    account.fit()
    each = [b - a for a, b in pairwise(spent)]
    total = 0.0
    for stage, n in zip(stages, steps, strict=True):
        first, further, each = each[0], each[1:n], each[n:]
        total += first + sum(further) / max(1, len(further)) * (stage.steps - 1)
    trainer = account.trainer
    product = product_of(recipe, trainer.product.eval(), trainer.data, "")
    assert recipe.evaluate is not None  # `board.ranked` has only those that are measured
    preset = judge_of(product, recipe.evaluate).preset
    make = of_product(preset, product, "").generate(0)
    sampled = seconds_per_1000(make, list(range(min(BATCH, preset.number))))
    calls = len(product.sampler.steps)
    return {"cpu_seconds": total, "seconds": sampled, "steps": calls, "timed": sum(steps), "commit": commit()[:7]}
