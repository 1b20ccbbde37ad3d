"""What `fewstep fit` can be asked for: the fields are its options, with their help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from typer import Argument, Option

from fewstep.config import UserError

SOLVERS = ("ddim", "2m")
MOST_NOISES = 10_000


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """One call of `fewstep fit`; None and False stand for what was not asked for."""

    source: Annotated[
        str, Argument(help="A teacher's diffusers folder or assets:NAME, a run directory, or a recipe that names one.")
    ]
    out: Annotated[Path, Option(help="Folder to write; sample, eval, compare and export open it.")]
    calls: Annotated[str, Option(help="Numbers of network calls.")] = "3,4,5"
    solver: Annotated[
        str, Option(help="ddim with a fitted weight of history a step, or 2m: DPM-Solver++(2M), which pipelines have.")
    ] = "ddim"
    points: Annotated[int, Option(help="Levels that are searched, even in the process's own time.")] = 32
    noises: Annotated[int, Option(help="Calibration noises; no measurement ever draws them.")] = 60
    seed: Annotated[int, Option(help="Seed of these noises.")] = 7
    guidance: Annotated[
        float | None, Option(help="Guidance scale, stored: the fit holds there only [default: the recipe's, else 1].")
    ] = None
    no_history: Annotated[bool, Option("--no-history", help="Levels alone, which more pipelines take.")] = False
    teacher: Annotated[bool, Option("--teacher", help="Of a run of a student: its teacher.")] = False
    preset: Annotated[
        str | None, Option(help="Protocol of the table [default: the recipe's; without one, distances to the fine path].")
    ] = None
    against: Annotated[str | None, Option(help="Compare with a folder of real pictures or a statistics file.")] = None
    samples: Annotated[int | None, Option(min=2, help="Number of samples of the table.")] = None
    no_table: Annotated[bool, Option("--no-table", help="Measure nothing.")] = False
    force: Annotated[bool, Option("--force", help="Overwrite an earlier fit.")] = False

    PANELS: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("calls", "solver", "points", "noises", "seed", "guidance", "no_history", "teacher"), "What is fitted"
        ),
        **dict.fromkeys(("preset", "against", "samples", "no_table"), "What is measured"),
        **dict.fromkeys(("out", "force"), "What is written"),
    }
    """The options by the panels of the help."""

    def __post_init__(self) -> None:
        # Here, before the command imports torch, which takes seconds.
        if self.solver not in SOLVERS:
            raise UserError(f"--solver {self.solver}: is not one of {', '.join(SOLVERS)}")
        if self.solver == "2m" and self.no_history:
            raise UserError("--no-history: 2m is made of history; leave out one of the two")
        if not 1 <= self.noises <= MOST_NOISES:
            raise UserError(f"--noises {self.noises}: expected 1 to {MOST_NOISES}; ten to sixty do")
        if self.points < 1:
            raise UserError(f"--points {self.points}: must be at least 1")
        if self.guidance is not None and not 0 <= self.guidance < 1000:
            raise UserError(f"--guidance {self.guidance:g}: expected a scale from 0 on; 1 is none")
        if self.no_table and (self.preset or self.against or self.samples):
            raise UserError("--no-table: leave it out, or --preset, --against and --samples")
