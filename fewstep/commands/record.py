"""Numbers of runs for the method cards: what `fewstep methods record` takes from run directories and comparisons."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isclose
from pathlib import Path
from statistics import variance
from typing import Any

from fewstep.commands.compare.kept import evaluation_of, of_students
from fewstep.commands.fitted_row import METHOD
from fewstep.commands.report import read_results
from fewstep.config import UserError
from fewstep.eval.protocol.evaluation import Evaluation, distance_of
from fewstep.files import atomic_path, expanded, parse_json, read_json
from fewstep.recipe.diff import differences
from fewstep.recipe.fields import REQUIRED, keys_of
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
    """Of all stages."""
    commit: str
    sampling: float | None = field(default=None, compare=False)
    """The part of `error` by the samples alone; is not kept."""
    before: str = ""
    """Commit since which the method's loss or the recipe is another than it was for these numbers."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Entries with one key are of one setting; a later recording replaces the earlier one."""
        return self.recipe, self.settings, self.metric, self.steps, self.samples, self.updates


def record(sources: Sequence[Path], out: Path) -> list[Entry]:
    """Put the numbers of run directories and of files by `fewstep compare` into a file of JSON lines; returns them.

    Runs of one setting with several seeds become one entry. Raises UserError for a source that is neither, that has
    no results yet, or that is no run of a shipped recipe.
    """
    runs: dict[tuple[Any, ...], list[Entry]] = {}
    teachers: dict[tuple[Any, ...], Entry] = {}
    for source in {s.resolve(): s for s in sources}.values():
        data = _comparison(source) if source.suffix == ".json" else None
        for entry in [of_run(source)] if data is None else students_of(data):
            runs.setdefault(entry.key, []).append(entry)
        if data is not None and (teacher := best_teacher(data)) is not None:
            teachers[teacher.key] = teacher  # one measurement in each comparison, no seeds of a training
    made = {key: joined(entries) for key, entries in runs.items()} | teachers
    kept = _kept(out) if out.exists() else []
    every = {e.key: e for e in kept} | made
    lines = [json.dumps(_line(every[key])) for key in sorted(every, key=str)]
    with atomic_path(out) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return list(made.values())


def _line(entry: Entry) -> dict[str, Any]:
    return {k: v for k, v in asdict(entry).items() if k != "sampling" and (k != "before" or v)}


def _kept(out: Path) -> list[Entry]:
    """The entries that a file holds already. UserError naming file and line of what is none."""
    found = []
    for number, line in enumerate(out.read_bytes().splitlines(), 1):
        try:
            found.append(_entry(parse_json(line, out)))
        except (UserError, KeyError, TypeError):
            raise UserError(f"{out}:{number}: is no entry of `fewstep methods record`; choose another --out") from None
    return found


def joined(entries: Sequence[Entry]) -> Entry:
    """Entries of one setting as one over all their seeds, whose samples are of the same noises."""
    first, *more = entries
    if not more:
        return first
    values = [v for e in entries for v in e.values]
    drawn = [s**2 * len(e.values) for e in entries if (s := e.sampling) is not None]
    error = (variance(values) / len(values) + sum(drawn) / len(values)) ** 0.5 if len(drawn) == len(entries) else None
    commits = ", ".join(dict.fromkeys(c for e in entries for c in e.commit.split(", ")))
    return replace(first, values=tuple(values), error=error, commit=commits)


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
        **_numbers(row) | {"steps": len(recipe.sampler().steps), "sampling": row.distance.standard_error},
        updates=sum(stage.steps for stage in recipe.stages()),
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


def _comparison(path: Path) -> dict[str, Any]:
    """What a file by `fewstep compare` holds, its rows read; UserError for another file."""
    try:
        data = read_json(path)
        for part in ("rows", "teachers"):
            data[part] = [evaluation_of(r) for r in data[part]]
        # The row names its metric and its number of samples.
        named = ("evaluate.metric=", "evaluate.samples=")
        data["settings"] = tuple(s for s in of_students(data["settings"]) if not s.startswith(named))
        data["commits"], data["commit"] = commits_of(data), data["environment"]["commit"][:7]
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no file by `fewstep compare`: {error}") from None
    return data


def students_of(data: Mapping[str, Any]) -> list[Entry]:
    """Each recipe of a comparison at its own number of steps."""
    out = []
    for row in data["rows"]:
        if row.group in shipped() and row.steps == len(load(row.group).sampler().steps):
            distance = row.metrics[distance_of(row) or ""]
            values, sampling = distance["values"], distance.get("sampling_error")
            cost = {k: row.training[k] for k in ("method", "updates")}
            commit = ", ".join(data["commits"].get(row.group, ())) or data["commit"]
            told = _numbers(row) | cost | {"settings": data["settings"], "commit": commit, "sampling": sampling}
            out.append(Entry(recipe=row.group, values=tuple(values), **told))
    return out


def best_teacher(data: Mapping[str, Any]) -> Entry | None:
    """The teacher of a comparison at its best number of steps; None where its runs do not say which shipped one it was.

    Nor where one of its recipes has it otherwise than it ships, such as in another process, where as many steps lie at
    other levels.
    """
    rows = [row for row in data["teachers"] if not row.training]  # a fitted teacher's row tells what its fit had cost
    # What the recipe names today need not be what these runs were distilled from.
    path = next((str(run["teacher"]["path"]) for run in data.get("runs", ()) if run.get("teacher")), "")
    source = path.removeprefix("assets:")
    names = {row.group for row in data["rows"] if row.training["method"] != METHOD}  # a fit is no recipe
    names |= {f["recipe"] for f in data.get("failed", ())}
    if not rows or source not in shipped() or not teacher_as_it_is(names, data["settings"]):
        return None
    recipe, relay = load(source), expanded(path) / "relay.json"
    # One that is trained in legs need not have had as many updates as its recipe asks for.
    updates = shipped_as(read_json(relay), rows) if relay.is_file() else sum(s.steps for s in recipe.stages())
    if updates is None:
        return None
    best, method = min(rows, key=lambda row: row.distance.value), str(recipe.method.name)
    settings = tuple(s for s in data["settings"] if s.startswith(("data.", "evaluate.")))
    told = _numbers(best) | {"updates": updates, "commit": data["commit"], "settings": settings}
    return Entry(recipe=source, method=method, values=(best.distance.value,), **told)


def teacher_as_it_is(names: Iterable[str], settings: Sequence[str] = ()) -> bool:
    """Whether recipes, all of them shipped, have their teacher as it comes: no other process, no guidance inside."""
    changes = [s for s in settings if s.startswith("teacher.")]
    specs: list[Any] = [load(name, changes).teacher if name in shipped() else None for name in names]
    return bool(specs) and all(spec is not None and _as_it_is(spec) for spec in specs)


def _as_it_is(spec: Any) -> bool:
    return all(k.default in (REQUIRED, getattr(spec, k.name)) for k in keys_of(type(spec)))


def shipped_as(relay: Mapping[str, Any], rows: Iterable[Evaluation]) -> int | None:
    """Updates of those weights, of all that a relay.json tells of, that rows of a teacher are of; None for others.

    They are the same where any was measured alike: as many samples by as many steps, to the same distance.
    """
    known = [*({"updates": relay["updates"], **row} for row in relay["measured"]), *relay.get("shipped_before", ())]
    for row in rows:
        for told in known:
            alike = (told["heun_steps"], told["samples"]) == (row.steps, row.number)
            if alike and isclose(told["value"], row.distance.value, rel_tol=1e-6):
                return int(told["updates"])
    return None


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
