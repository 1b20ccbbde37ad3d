"""One sheet of several runs: the data's own picture of each caption, the teacher's, each student's, from the same noises.

python -m fewstep.bench.wall RUN... [--prompt "red apple" ...] [--teacher 8] [--out runs/wall.png]

It also prints how strong the colours of each are over all captions, as a share of the teacher's, which is guided as the
first run's recipe evaluates it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.commands.gallery import captioned
from fewstep.commands.pictures import in_colour, require_finite, save_picture
from fewstep.commands.sample_text import Row, of_run
from fewstep.config import UserError
from fewstep.recipe.store import load_run
from fewstep.train.samples import saturation

PROMPTS = (
    "red apple",
    "banana",
    "watermelon",
    "broccoli",
    "slice of pizza",
    "hamburger",
    "doughnut",
    "green apple",
    "carrot",
    "tangerine",
)


def rows(runs: Sequence[Path], prompts: Sequence[str], teacher: int, seed: int = 0) -> tuple[list[Row], list[int]]:
    """(name, images (n, c, h, w) in [-1, 1]) of the data, the first run's teacher by Heun steps, and each run's student.

    They are of all captions of the first run's data; the numbers are those of the prompts among them.

    Raises:
        UserError: a prompt that the data has no picture of.
    """
    data: Any = load_run(runs[0]).data.open()
    captions = [item.caption for item in getattr(data, "items", ())]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.absolute().parent.name}/{run.name}" for run in runs]
    if missing := [p for p in prompts if p not in captions]:
        raise UserError(f"--prompt {missing[0]!r}: {runs[0]}: its data has no picture of it")
    found = [("data", data.images)]
    for k, (run, name) in enumerate(zip(runs, names, strict=True)):
        made = of_run(run, captions, None, False, seed, 0 if k else teacher, None)
        found += [*made[:-1], (f"{name}, {made[-1][0].partition(', ')[2]}", made[-1][1])]
    for name, x in found:
        require_finite(x, name)
    return found, [captions.index(p) for p in prompts]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.bench.wall", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories of text-to-image students")
    parser.add_argument("--prompt", nargs="+", default=list(PROMPTS), help="captions of the data")
    parser.add_argument("--teacher", type=int, default=8, help="Heun steps of the first run's teacher; 0: without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/wall.png"))
    given = parser.parse_args(argv)
    drawn, shown = rows(given.runs, given.prompt, given.teacher, given.seed)
    save_picture(captioned([(n, in_colour(x[shown])) for n, x in drawn], given.prompt), given.out)
    strength = [(name, float(saturation(in_colour(x).clamp(-1, 1)))) for name, x in drawn]
    print(f"{given.out}; saturation over {len(drawn[0][1])} captions:")
    for name, value in strength:
        share = f", {value / strength[1][1]:.2f} of {strength[1][0]}" if given.teacher and strength[1][1] else ""
        print(f"{name}: {value:.3f}{share}")


if __name__ == "__main__":
    main()
