"""False alarms: what the guard says of whole runs of shipped recipes, from their logs.

python -m fewstep.bench.alarms RUN [RUN ...] [--out assets/alarms.jsonl]

A run counts that changed nothing but its seed and where its files are, whose log reaches the shipped recipe's end and has
what today's rules read. Lines and courses are judged anew, leaps are those that the training has logged. Whether an alarm
was false its reader judges: docs/healthy.md names every one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fewstep.bench.conformance import record
from fewstep.commands.record import named
from fewstep.config import UserError
from fewstep.files import parse_json
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load, load_run
from fewstep.train.claim import read_origin
from fewstep.train.log import read_log
from fewstep.train.pulse import KEYS
from fewstep.train.verdicts import Course, Record

AS_SHIPPED = ("steps", "guard", "readings_every", "log_every")
"""Settings of a run that `named` does not look at, and on which alarms depend."""


@dataclass(frozen=True)
class Whole:
    """One whole run."""

    recipe: str
    updates: int
    """Of all stages."""
    readings: int
    """Records that hold readings of drawn samples."""
    commit: str
    """That trained it."""
    alarms: dict[str, int] = field(default_factory=dict)
    """The guard's alarms and the step of the first of each."""


def said(records: Sequence[Record]) -> dict[str, int]:
    """The guard's alarms over a log's stages, each with the step at which it came first."""
    out: dict[str, int] = {}
    course, stage = Course(), None
    for row in records:
        if isinstance(act := row.get("guard"), dict):
            out.setdefault(str(act.get("alarm")), int(row["done"]))  # the records that raised it are cut
        if "stage" not in row:
            continue
        if row["stage"] != stage:
            course, stage = Course(), row["stage"]
        course.add(row)
        for verdict in course.alarms():
            out.setdefault(verdict.name, int(row["done"]))
    return out


def whole(run: Path) -> Whole:
    """The row of a run directory.

    Raises:
        UserError: it is no run of a shipped recipe as it is, or its log ends before the recipe does.
    """
    recipe = load_run(run)
    name, settings = named(recipe, run)
    plain, every = load(name), read_log(run / "log.jsonl")
    changed = [k for s in settings if not (k := s.partition("=")[0]).endswith("path")]
    changed += [f"train.{k}" for k in AS_SHIPPED if getattr(recipe.train, k) != getattr(plain.train, k)]
    if changed:
        raise UserError(f"{run}: has changed {', '.join(changed)} of {name}; runs of shipped recipes as they are count")
    records = [r for r in every if "stage" in r]
    total, done = sum(s.steps for s in plain.stages()), max((int(r["done"]) for r in records), default=0)
    if done < total:
        raise UserError(f"{run}: its log ends at {done} of {total} updates; only whole runs tell of false alarms")
    for one, other in (("samples/mean", "samples/offset"), ("health/diversity", KEYS[1])):
        if any(one in r and other not in r for r in records):
            raise UserError(f"{run}: its log has {one} without {other}; it is older than the rules that read it")
    readings = sum("samples/mean" in r for r in records)
    commit = str(read_origin(run).get("environment", {}).get("commit", "unknown"))[:7]
    return Whole(name, total, readings, commit, said(every))


def table(file: Path) -> str:
    """A sentence of how many shipped recipes were run whole and which of them had alarms."""
    if not file.is_file():
        return "None has been counted yet."
    rows = [parse_json(line, file) for line in file.read_text().splitlines()]
    ran = {r["recipe"] for r in rows}
    loud = [r for r in rows if r["alarms"]]
    every = [n for n in shipped() if not n.startswith(("paper/", "models/"))]
    text = (
        f"Over whole runs of {len(ran)} of the {len(every)} shipped recipes (paper/ and models/ aside; one each, "
        f"{sum(r['readings'] for r in rows):,} readings of samples) the guard raised alarms in {len(loud)}"
    )
    if loud:
        told = (f"`{r['recipe']}` ({', '.join(f'{k} at {v}' for k, v in r['alarms'].items())})" for r in loud)
        text += ": " + "; ".join(told)
    left = ", ".join(f"`{n}`" for n in sorted({*every} - ran)) or "none"
    return f"{text}.\n\nNo whole run with the guard on (boards train without it): {left}."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.bench.alarms", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directories of finished runs")
    parser.add_argument("--out", type=Path, default=Path("alarms.jsonl"))
    given = parser.parse_args(argv)
    for run in given.runs:
        try:
            row = whole(run)
        except UserError as error:
            print(f"left out: {error}", flush=True)
            continue
        record(given.out, asdict(row))
        print(f"{row.recipe}: {row.alarms or 'no alarm'}", flush=True)


if __name__ == "__main__":
    main()
