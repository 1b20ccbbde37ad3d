"""What readings of samples cost: the time of one beside that of the updates between two of them, taken in turn.

python -m fewstep.bench.readings [RECIPE ...]    digits-dmd2, digits-dmd2-4step and digits-cd when none is named
"""

from __future__ import annotations

import statistics
import sys

from fewstep.bench.timing import in_turn
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer

NAMES = ("digits-dmd2", "digits-dmd2-4step", "digits-cd")


def share(name: str, rounds: int = 5) -> tuple[float, float, float, int]:
    """(median share of a step, seconds of a reading, of a step, updates between readings) of a recipe's last stage."""
    trainer = Trainer(load(name), cpu=True)
    stage, guard = trainer.recipe.stages()[-1], trainer.guard
    trainer.loop.begin(stage)

    def step() -> None:
        trainer.loop.step(stage)
        trainer.progress.step += 1

    def read() -> None:
        guard.read(stage, trainer.progress, first=True)

    step(), read()
    pairs = in_turn(read, step, rounds)
    every = next(n for n in range(1, 10**6) if guard.readings is not None and guard.readings.due(stage, n))
    ratio = statistics.median(a / b for a, b in pairs)
    return (
        ratio / every,
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        every,
    )


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        part, reading, step, every = share(name)
        told = f"{1000 * reading:.0f} ms every {every} steps of {1000 * step:.0f} ms"
        print(f"{name}: readings take {100 * part:.2f} % of a step ({told})", flush=True)


if __name__ == "__main__":
    main()
