"""What a recipe's training and samples cost on a machine at rest, for rows of the leaderboard made beside other work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from typing import Any

from fewstep.algebra.fitted import multistep, nodes
from fewstep.algebra.guidance import guided_teacher
from fewstep.algebra.sampling import Sampler
from fewstep.commands.compare.budget import Accounted, with_lengths
from fewstep.commands.compare.compare import imports_of
from fewstep.commands.judge import preset_of
from fewstep.commands.measure import teacher_product
from fewstep.commands.sources import BATCH, of_product
from fewstep.eval.protocol.latency import seconds_per_1000
from fewstep.files import commit
from fewstep.recipe.schema import Recipe
from fewstep.train.product import Product, product_of

TIMED = 24
"""Updates of each stage that are timed beside its first, which may build a bank of pairs and is counted once.

What a method begins later than that is not timed.
"""


def pace(recipe: Recipe, counts: Sequence[int], teachers: Sequence[tuple[str, int]] = ()) -> dict[str, Any]:
    """Processor seconds of the whole training, checkpoints left out, and seconds of 1,000 samples by so many steps each.

    They are those of a few updates and of the student after them: what a network costs does not depend on its weights.

    teachers: (name, steps) of its teacher's rows, whose samples are timed too, in smaller batches for their many calls.
            Any levels cost a fitted one alike.
    """
    stages = recipe.stages()
    steps = [min(stage.steps, TIMED + 1) for stage in stages]
    for module in imports_of([recipe]):  # seconds, which are no training
        import_module(module)
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
    assert recipe.evaluate is not None  # `boards.ranked` has only those that are measured
    preset = preset_of(recipe.evaluate)

    def drawn(what: Product, batch: int = BATCH) -> float:
        return seconds_per_1000(of_product(preset, what, "").generate(0), list(range(min(batch, preset.number))))

    seconds = {str(n): drawn(product.with_steps(n)) for n in counts}
    net = guided_teacher(trainer.roles.teacher, recipe.evaluate.guidance, trainer.data.null) if teachers else None
    theirs = {name: drawn(_teacher(product, net, name, n), BATCH // 4) for name, n in teachers}
    return {
        "cpu_seconds": total,
        "seconds": seconds,
        "teachers": theirs,
        "timed": sum(steps),
        "commit": commit()[:7],
    }


def _teacher(product: Product, net: Any, name: str, steps: int) -> Product:
    """A teacher as its row was drawn."""
    if not name.startswith("teacher fitted"):
        return teacher_product(product, net, steps)
    levels = nodes(net.process, steps)
    return replace(product, net=net, sampler=Sampler(kind="map", steps=levels, history=multistep(net.process, levels)))
