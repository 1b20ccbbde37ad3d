"""Numbers of runs for the method cards: what `fewstep methods record` takes from run directories and comparisons."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.commands.compare.kept import evaluation_of
from fewstep.commands.report import read_results
from fewstep.config import UserError
from fewstep.eval.protocol.evaluation import Evaluation, distance_of
from fewstep.files import atomic_path, expanded, parse_json, read_json
from fewstep.recipe.diff import differences
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load, load_run

FILE = "results.jsonl"
"""In the checkout's assets; the cards read it."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A number of a shipped recipe, over one or more seeds; a line of the file."""

    recipe: str
    method: str
    settings: tuple[str, ...]
    """key=value of what was changed, other than lengths and seeds."""
    metric: str
    steps: int
    values: tuple[float, ...]
    """One a seed."""
    error: float | None
    """One standard error of their mean from the finite set of samples and, with several seeds, their spread."""
    samples: int
    updates: int
    """Student updates of the last stage."""
    commit: str
    before: str = ""
    """Commit since which the method's loss or the recipe is another than it was for these numbers."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Entries with one key are of one setting; a later recording replaces the earlier one."""
        return self.recipe, self.settings, self.metric, self.steps, self.updates


def record(sources: Sequence[Path], out: Path) -> list[Entry]:
    """Put the numbers of run directories and of files by `fewstep compare` into a file of JSON lines; returns them.

    Runs of one setting with several seeds become one entry. Raises UserError for a source that is neither, that has
    no results yet, or that is no run of a shipped recipe.
    """
    made: dict[tuple[Any, ...], Entry] = {}
    for source in sources:
        data = _comparison(source) if source.suffix == ".json" else None
        for entry in [of_run(source)] if data is None else students_of(data):
            earlier = made.get(entry.key)
            made[entry.key] = entry if earlier is None else joined(earlier, entry)
        if data is not None and (teacher := teacher_of(data)) is not None:
            made[teacher.key] = teacher  # in each comparison the same weights, no seeds of a training
    kept = _kept(out) if out.exists() else []
    every = {e.key: e for e in kept} | made
    lines = [json.dumps(_line(every[key])) for key in sorted(every, key=str)]
    with atomic_path(out) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return list(made.values())


def _line(entry: Entry) -> dict[str, Any]:
    return {k: v for k, v in asdict(entry).items() if k != "before" or v}


def _kept(out: Path) -> list[Entry]:
    """The entries that a file holds already. UserError naming file and line of what is none."""
    found = []
    for number, line in enumerate(out.read_bytes().splitlines(), 1):
        try:
            found.append(_entry(parse_json(line, out)))
        except (UserError, KeyError, TypeError):
            raise UserError(f"{out}:{number}: is no entry of `fewstep methods record`; choose another --out") from None
    return found


def joined(a: Entry, b: Entry) -> Entry:
    """Two entries of one setting as one over both their seeds."""
    values = (*a.values, *b.values)
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    commits = ", ".join(dict.fromkeys((*a.commit.split(", "), *b.commit.split(", "))))
    return replace(a, values=values, error=spread / len(values) ** 0.5, commit=commits)


def of_run(run: Path) -> Entry:
    """The number of a finished run directory, at its recipe's own sampler."""
    recipe = load_run(run)
    path = run / "report" / "results.json"
    if not path.is_file():
        raise UserError(f"{run}: has no report/results.json; the run is not finished, or its recipe evaluates nothing")
    name, settings = named(recipe, run)
    rows = read_results(path)
    if not rows:
        raise UserError(f"{path}: holds no measured row")
    row = rows[-1]
    return Entry(
        recipe=name,
        method=recipe.method.name,
        settings=settings,
        values=(row.distance.value,),
        **_numbers(row) | {"steps": len(recipe.sampler().steps)},
        updates=recipe.train.steps,
        commit=read_json(path).get("commit", "unknown"),
    )


def named(recipe: Recipe, run: Path) -> tuple[str, tuple[str, ...]]:
    """The shipped recipe of a run and what it changed, lengths and seeds aside."""
    for name in shipped():
        own = load(name)
        if own.about == recipe.about:
            found = (d.partition(": ") for d in differences(own, recipe))
            changed = (f"{key}={told.rpartition(' -> ')[2]}" for key, _, told in found)
            return name, tuple(c for c in changed if not c.startswith("train.seed="))
    raise UserError(f"{run}: is no run of a shipped recipe (about: {recipe.about}); cards are of those")


def of_comparison(path: Path) -> list[Entry]:
    """The numbers of a file by `fewstep compare`: its students, and its teacher where the runs say which one it was."""
    data = _comparison(path)
    teacher = teacher_of(data)
    return [*students_of(data), *([] if teacher is None else [teacher])]


def _comparison(path: Path) -> dict[str, Any]:
    """What a file by `fewstep compare` holds, its rows read; UserError for another file."""
    try:
        data = read_json(path)
        for part in ("rows", "teachers"):
            data[part] = [evaluation_of(r) for r in data[part]]
        # The row names the metric and the number of samples.
        data["settings"] = tuple(s for s in data["settings"] if not s.startswith("evaluate.metric="))
        commits_of(data)
        data["environment"]["commit"][:7]
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no file by `fewstep compare`: {error}") from None
    return data


def students_of(data: Mapping[str, Any]) -> list[Entry]:
    """Each recipe of a comparison at its own number of steps."""
    trained, out = commits_of(data), []
    for row in data["rows"]:
        if row.group in shipped() and row.steps == len(load(row.group).sampler().steps):
            values = row.metrics[distance_of(row) or ""]["values"]
            cost = {k: row.training[k] for k in ("method", "updates")}
            commit = ", ".join(trained.get(row.group, ())) or data["environment"]["commit"][:7]
            told = _numbers(row) | cost | {"settings": data["settings"], "commit": commit}
            out.append(Entry(recipe=row.group, values=tuple(values), **told))
    return out


def teacher_of(data: Mapping[str, Any]) -> Entry | None:
    """The teacher of a comparison at its best number of steps, where its runs say which shipped one it was."""
    own = [row for row in data["teachers"] if not row.training]  # a fitted teacher's row tells what its fit had cost
    best = min(own, key=lambda row: row.distance.value, default=None)
    # What the recipe names today need not be what these runs were distilled from.
    told = next((run["teacher"] for run in data.get("runs", ()) if run.get("teacher")), {"path": ""})
    path = str(told["path"])
    source = path.removeprefix("assets:")
    if best is None or source not in shipped():
        return None
    recipe, relay = load(source), expanded(path) / "relay.json"
    method: str = recipe.method.name
    return Entry(
        recipe=source,
        method=method,
        settings=(),
        values=(best.distance.value,),
        **_numbers(best),
        # One that is trained in legs need not have had as many updates as its recipe asks for.
        updates=read_json(relay)["updates"] if relay.is_file() else recipe.train.steps,
        commit=data["environment"]["commit"][:7],
    )


def commits_of(comparison: Mapping[str, Any]) -> dict[str, Counter[str]]:
    """How many runs of each recipe were trained at which commit; the file's own is that of the last measurement."""
    found: dict[str, Counter[str]] = {}
    for run in comparison.get("runs", ()):
        commit = run["commit"]
        found.setdefault(run["recipe"], Counter())[commit[:7] + "-dirty" * commit.endswith("-dirty")] += 1
    return found


def resumed_of(comparison: Mapping[str, Any]) -> set[str]:
    """Recipes with runs that were interrupted and went on from a checkpoint."""
    return {run["recipe"] for run in comparison.get("runs", ()) if run.get("resumes")}


def _numbers(row: Evaluation) -> dict[str, Any]:
    """What an entry takes from a row as it is."""
    metric = (distance_of(row) or "").translate(str.maketrans("", "", "()"))
    error = row.distance.standard_error
    return {"metric": metric, "steps": row.steps, "error": error, "samples": row.number}


def _entry(line: dict[str, Any]) -> Entry:
    return Entry(**line | {"settings": tuple(line["settings"]), "values": tuple(line["values"])})
