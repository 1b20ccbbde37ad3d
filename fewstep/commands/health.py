"""Is my run healthy? The verdicts of `fewstep.train.verdicts` on a run's log, as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.config import UserError
from fewstep.recipe.expected import Expected
from fewstep.recipe.store import load_run
from fewstep.train.bands import compared, differs, identity
from fewstep.train.guard import addressed
from fewstep.train.log import read_log
from fewstep.train.state import checkpoints, read_origins
from fewstep.train.verdicts import FEWEST, Record, Verdict, alarms, last_stage, series, verdicts

REMAKE = "make them again with `fewstep recipes expect` from runs of these settings"

MARKS = {"fine": "ok", "warn": "WARN", "alarm": "ALARM"}


def report(run: Path) -> str:
    """All findings of a run directory as text, or the first and last readings of a log too short for findings.

    UserError when there is no log, or none of its readings.
    """
    path = run / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{run}: has no log.jsonl; is it a run directory?")
    records = read_log(path)
    found = findings(run, records)
    if not found:
        return short(run, last_stage(records))
    width = max(len(v.name) for v in found)
    since = alarms(last_stage(records))
    lines = []
    for v in found:
        when = f" (alarm since step {since[v.name]})" if v.level == "alarm" and v.name in since else ""
        lines.append(f"{MARKS[v.level]:<5}  {v.name:<{width}}  {v.sentence}{when}")
        if v.remedy:
            lines.append(f"{'':<{9 + width}}-> {v.remedy}")
    wrong = [v.name for v in found if v.level == "alarm"]
    return "\n".join([*lines, "", f"{run.name}: {', '.join(wrong) if wrong else 'fine'}"])


def findings(run: Path, records: Sequence[Record]) -> list[Verdict]:
    """What a log's last stage tells, bands of the recipe included; remedies in keys of the run's recipe."""
    found = [*verdicts(records), *expectations(run, records)]
    last = last_stage(records)
    return addressed(found, load_run(run), last[-1]["stage"]) if last and (run / "recipe.yaml").is_file() else found


def expectations(run: Path, records: Sequence[Record]) -> list[Verdict]:
    """Whether a run is within its recipe's bands; nothing where it has none, or is no directory of a run."""
    expected, why = bands_of(run)
    if why:
        return [Verdict("no bands", "warn", 0.0, 0.0, f"the recipe's expected bands are not compared: {why}", REMAKE)]
    return compared(records, expected) if expected else []


def bands_of(run: Path) -> tuple[Expected | None, str]:
    """A run's bands; None where it has none or tells too little, and None with why where they are not its own."""
    recipe = load_run(run) if (run / "recipe.yaml").is_file() else None
    held = checkpoints(run / "checkpoints")
    if recipe is None or recipe.expected is None or not held:
        return None, ""
    why = differs(recipe.expected, identity(recipe, read_origins(held[-1])))
    return (None, why) if why else (recipe.expected, "")


def short(run: Path, records: Sequence[Record]) -> str:
    """What a log says that has no findings: where each reading began and where it is."""
    skip = ("done", "stage", "lr/", "seconds")
    keys = [k for k in dict.fromkeys(k for r in records for k in r) if not k.startswith(skip) and series(records, k)]
    if not keys:
        raise UserError(f"{run}: has no record in its log yet; train longer or lower train.log_every")
    count = f"{len(records)} record{'s' * (len(records) > 1)} in the last stage"
    why = f"judged from {FEWEST} on: train longer or lower train.log_every"
    if len(records) >= FEWEST:
        why = "none of its readings is judged"
    width = max(map(len, keys))
    rows = [(k, series(records, k)) for k in keys]
    return "\n".join([f"{k:<{width}}  {v[0]:.3g} -> {v[-1]:.3g}" for k, v in rows] + ["", f"{run.name}: {count}, {why}"])
