"""`fewstep compare`: several recipes under one budget and several seeds, measured alike and ranked.

Each run trains in a process of its own, so that a crash loses nothing but itself and memory is measured per run.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import shlex
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fewstep.commands.compare import ranking
from fewstep.commands.compare.budget import Budget, lengths, with_lengths
from fewstep.commands.compare.kept import claimed, left_by, message_of, read_evaluations, write_json
from fewstep.commands.compare.one_run import (
    NEVER,
    Task,
    refuse_changes,
    say,
    work,
)
from fewstep.commands.compare.shown import show
from fewstep.commands.fitted_row import calls_of, wish_for
from fewstep.commands.judge import judge_of
from fewstep.commands.progress import clock
from fewstep.commands.report import with_error
from fewstep.commands.trust import allow_own_code
from fewstep.config import UserError, plain
from fewstep.data.toy import Ring
from fewstep.eval.protocol.evaluation import LESS_IS_BETTER, Evaluation, distance_of
from fewstep.files import file_sha256
from fewstep.networks import code
from fewstep.recipe.schema import Evaluate, Recipe
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load
from fewstep.train.claim import settled
from fewstep.train.fitted import NAME, is_fit
from fewstep.train.product import product_of


def compare(
    recipes: Sequence[str],
    budget: str,
    seeds: int,
    out: Path,
    resume: bool,
    settings: Sequence[str],
    steps: Sequence[int],
    samples: int | None,
    points: int = 0,
) -> Path:
    """`fewstep compare`: run what is not done yet, then write results.json, report.md and report.html in `out`.

    points: of each run's curve over its last stage, the end among them; curves.png shows them.
    """
    amount = Budget.parse(budget)
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, not {seeds}")
    if any(n < 1 for n in steps):
        raise UserError(f"--steps: must be at least 1, not {min(steps)}")
    if points < 0 or points == 1:
        raise UserError(f"--curve must be 0 or at least 2, the end among them, not {points}")
    fits = [name for name in dict.fromkeys(recipes) if is_fit(Path(name))]
    loaded = {name: settled(load(name, [*settings, *NEVER])) for name in dict.fromkeys(recipes) if name not in fits}
    if not loaded:
        raise UserError("compare: name a recipe too; a fit trains nothing that a budget could be for")
    for name, recipe in loaded.items():
        allow_own_code(name, settings, recipe)
        code.require(recipe)
    evaluation = common(loaded, samples)
    evaluation = replace(evaluation, samples=check_judges(loaded, evaluation))
    names = folders(dict.fromkeys([*loaded, *fits]))
    content = {"budget": str(amount), "settings": list(settings), "steps": list(steps)}
    tasks = [
        Task(
            name,
            out / names[name] / f"seed-{seed}",
            tuple(settings),
            amount,
            evaluation,
            tuple(steps),
            seed,
            points=points,
        )
        for name in loaded
        for seed in range(seeds)
    ]
    teachers = [
        *teacher_tasks(tasks, loaded, out / "teachers", names),
        *fitted_tasks(tasks, loaded, out / "fitted", names),
    ]
    again = [
        "fewstep",
        "compare",
        *recipes,
        "--budget",
        budget,
        "--seeds",
        str(seeds),
        "--out",
        str(out),
        "--resume",
    ]
    again += ["--steps", ",".join(map(str, steps))] if steps else []
    again += ["--samples", str(samples)] if samples is not None else []
    again += ["--curve", str(points)] if points else []
    again += [part for s in settings for part in ("--set", s)]
    again += next((w for recipe in loaded.values() if (w := code.words(recipe))), [])
    with claimed(out, resume, {**content, "evaluation": asdict(evaluation)}):
        for task in tasks:
            if task.kept() is not None:
                refuse_changes(task.folder, task.load())
        tasks += fit_tasks(tasks[0], {name: out / names[name] / "fit" for name in fits})
        beside = f", beside {len(fits)} fit{'s' * (len(fits) > 1)}" if fits else ""
        say(f"{len(loaded)} recipes x {seeds} seeds, {amount} each{beside}, in {out}")
        for name in (n for n, recipe in loaded.items() if recipe.fills_teacher()):
            say(f"note: {name} trains its own teacher, which has no row; `fewstep eval RUN --teacher STEPS` measures it")
        with interrupted(shlex.join(again)):
            run_all([*teachers, *tasks])
        about = ranking.facts(amount, range(seeds), settings, evaluation)
        return finish(out, about, tasks, teachers)


def common(loaded: Mapping[str, Recipe], samples: int | None) -> Evaluate:
    """The evaluation of all recipes; UserError when they are not measured alike."""
    asked: dict[str, Evaluate] = {}
    for name, recipe in loaded.items():
        if recipe.evaluate is None:
            raise UserError(f"{name}: has evaluate: null, so nothing ranks it; give it a metric")
        asked[name] = recipe.evaluate
    first_name, first = next(iter(asked.items()))
    for name, other in asked.items():
        if other.metric != first.metric:
            raise UserError(
                f"{first_name} is measured by {first.metric} and {name} by {other.metric}: they cannot stand in one table"
            )
        alike = (("number", samples), ("seed", None), ("guidance", None), ("teacher_grid", None), ("retrieval", None))
        for key, option in (*alike, ("against", None), ("features", None), ("extractor_path", None)):
            if getattr(other, key) != getattr(first, key) and option is None:
                hint = "give one number to all with --samples" if key == "number" else f"use --set evaluate.{key}=VALUE"
                told = "samples" if key == "number" else key
                raise UserError(
                    f"{first_name} is measured with {told} {getattr(first, key)} and {name} with "
                    f"{getattr(other, key)}; {hint}"
                )
    if samples is not None and samples < 2:
        raise UserError(f"--samples must be at least 2, not {samples}")
    every = sorted({n for e in asked.values() for n in e.teacher_steps})
    fitted = first.fitted if all(e.fitted == first.fitted for e in asked.values()) else None
    return replace(first, samples=samples or first.samples, teacher_steps=tuple(every), fitted=fitted)


def check_judges(loaded: Mapping[str, Recipe], evaluation: Evaluate) -> int:
    """The number of samples that all are measured on.

    UserError when a recipe cannot be measured like that, or when two are compared with different data.
    """
    seen: dict[str, str] = {}
    numbers: dict[int, str] = {}
    for name, recipe in loaded.items():
        data: Any = recipe.data.open()
        try:
            judge = judge_of(product_of(recipe, nn.Identity(), data, name), evaluation)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        if not set(LESS_IS_BETTER) & set(judge.preset.metrics):
            raise UserError(f"{name}: preset {judge.preset.name} measures no distance, so nothing ranks it")
        seen.setdefault(judge.reference.digest, name)
        numbers.setdefault(judge.preset.number, name)
    if len(seen) > 1:
        first, second, *_ = seen.values()
        raise UserError(
            f"{first} and {second} are measured against different data by {evaluation.metric}: they cannot stand in one "
            "table"
        )
    if len(numbers) > 1:
        told = " and ".join(f"{name} on {number}" for number, name in numbers.items())
        raise UserError(f"samples: {told}, as there are so many held-out pictures; give one number to all with --samples")
    return next(iter(numbers))


def folders(names: Mapping[str, Any]) -> dict[str, str]:
    """A folder name per recipe; UserError when two would share one."""
    found: dict[str, str] = {}
    for name in names:
        folder = name.replace("/", "-") if name in shipped() else Path(name).stem
        taken = [other for other, f in found.items() if f == folder]
        if taken or folder in ("banks", "teachers", "fitted"):
            raise UserError(f"{name}: would use the folder {folder!r} of {(taken or ['the comparison'])[0]}; rename it")
        found[name] = folder
    return found


def teacher_tasks(
    tasks: Sequence[Task], loaded: Mapping[str, Recipe], folder: Path, names: Mapping[str, str]
) -> list[Task]:
    """One task per distinct teacher."""
    known = [group[0] for group in by_teacher(tasks, loaded) if group[0].evaluation.teacher_steps]
    return [replace(t, seed=None, folder=folder / names[t.recipe]) for t in known]


def fitted_tasks(
    tasks: Sequence[Task], loaded: Mapping[str, Recipe], folder: Path, names: Mapping[str, str]
) -> list[Task]:
    """One task per distinct teacher that is fitted, for the numbers of calls of all its students."""
    out = []
    for group in by_teacher(tasks, loaded):
        first, recipe = group[0], loaded[group[0].recipe]
        samplers = [loaded[t.recipe].sampler() for t in group]
        counts = {len(s.steps) for s in samplers if s.kind != "ode"} | set(first.steps)
        wish = wish_for(first.evaluation, recipe.teacher, counts, training_calls(first.budget, recipe))
        if wish is not None:
            out.append(replace(first, seed=None, counts=wish.calls, folder=folder / names[first.recipe]))
    return out


def training_calls(budget: Budget, recipe: Recipe) -> float:
    """At least so many network calls does a training under the budget take; endless where seconds are given."""
    if budget.in_steps:
        return calls_of(with_lengths(recipe, lengths(recipe, budget)))
    return budget.amount if budget.kind == "calls" else math.inf


def fit_tasks(like: Task, places: Mapping[str, Path]) -> list[Task]:
    """One task per folder by `fewstep fit`; a result of another fit in its place is measured again."""
    out = [replace(like, seed=None, folder=place, fit=Path(name)) for name, place in places.items()]
    for task in out:
        found = left_by(task.result)
        if found is not None and found.get("fit") != file_sha256(Path(str(task.fit)) / NAME):
            task.result.unlink()
    return out


def by_teacher(tasks: Sequence[Task], loaded: Mapping[str, Recipe]) -> list[list[Task]]:
    """The tasks of each distinct teacher; the process it is re-expressed in makes no other teacher.

    A teacher that a run fills itself is another in every run: none is measured beside them all.
    """
    found: dict[str, list[Task]] = {}
    for task in tasks:
        recipe = loaded[task.recipe]
        if recipe.fills_teacher():
            continue
        if recipe.teacher is not None:
            spec = {k: v for k, v in plain(recipe.teacher).items() if k != "process"}
            found.setdefault(json.dumps([spec, plain(recipe.data)], sort_keys=True, default=str), []).append(task)
    return list(found.values())


def run_all(tasks: Sequence[Task]) -> None:
    """Run every task without a result, one after the other."""
    waiting = [t for t in tasks if t.kept() is None]
    context = start_method({t.recipe: t.load() for t in waiting}.values())
    started, made = time.perf_counter(), 0
    for number, task in enumerate(tasks, 1):
        task = replace(task, place=f"[{number}/{len(tasks)}]")
        if task not in [replace(w, place=task.place) for w in waiting]:
            say(f"{task.title}: done before")
            continue
        say(f"{task.title}: started")
        run_one(context, task)
        made += 1
        left = (time.perf_counter() - started) / made * (len(waiting) - made)
        ahead = f"; about {clock(left)} left for the {len(waiting) - made} that wait" if made < len(waiting) else ""
        say(f"{task.title}: {outcome(task)}{ahead}")


def start_method(recipes: Iterable[Recipe]) -> Any:
    """Processes forked from a server that has imported what these need and computed nothing; spawned with CUDA."""
    if "forkserver" not in multiprocessing.get_all_start_methods() or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fewstep.commands.compare.one_run", *imports_of(recipes)])
    return context


def imports_of(recipes: Iterable[Recipe]) -> list[str]:
    """What runs import on their way, seconds in all; those on points build no network of diffusers."""
    found = ["torch._dynamo"]
    if not all(isinstance(recipe.data, Ring) for recipe in recipes):
        found += ["peft", "torchvision", "sklearn.datasets", "diffusers.models.unets.unet_2d"]
    return found


def run_one(context: Any, task: Task) -> None:
    """One child; if it is told to stop, so is it, and its checkpoint is awaited."""
    child = context.Process(target=work, args=(task,), daemon=False)
    child.start()
    try:
        child.join()
    except KeyboardInterrupt:
        child.terminate()
        child.join()
        raise
    if child.exitcode == 130:
        raise KeyboardInterrupt
    if child.exitcode != 0:
        if child.exitcode < 0:
            name = signal.Signals(-child.exitcode).name
            message = f"was ended by {name}" + (", often for lack of memory" if name == "SIGKILL" else "")
        else:
            message = f"left with exit status {child.exitcode}"
        write_json(task.failure, {"message": message, "traceback": ""})


@contextmanager
def interrupted(again: str) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the comparison with the command that continues it."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped; continue with: {again}")
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def outcome(task: Task) -> str:
    """A line on how a task ended."""
    result = task.kept()
    if result is None:
        return f"FAILED: {message_of(task.folder).splitlines()[0]}"
    rows = []
    for e in map(Evaluation.from_json, result["rows"]):
        steps = f"{e.steps} step{'s' * (e.steps != 1)}"
        rows.append(f"{distance_of(e)} {with_error(e.distance)} at {steps}")
    spent = f", {result['seconds']:.0f} s" if "seconds" in result else ""
    return "; ".join(rows) + spent


def finish(out: Path, about: dict[str, Any], tasks: Sequence[Task], teachers: Sequence[Task]) -> Path:
    """Rank what there is and write the report; UserError when nothing succeeded."""
    kept = [(t, r) for t in tasks if (r := t.kept()) is not None]
    failed = [
        {"recipe": t.name, "seed": t.seed, "message": message_of(t.folder)}
        for t in [*teachers, *tasks]
        if t.kept() is None
    ]
    ranked = ranking.rank(collect(kept))
    beside = [e for t in teachers if (r := t.kept()) is not None for e in read_evaluations(t.folder, r)]
    title = f"Comparison under {about['budget']}"
    ranking.write(out, title, about, ranked, beside, failed, [r for _, r in kept])
    show(Console(), title, ranked, beside, failed)
    if not ranked:
        raise UserError(f"no run succeeded; see {out / 'report.md'}")
    say(f"report {out / 'report.html'}, table {out / 'report.md'}, data {out / 'results.json'}")
    return out / "results.json"


def collect(kept: Sequence[tuple[Task, Mapping[str, Any]]]) -> list[Evaluation]:
    """A row per recipe and number of steps from the results of tasks."""
    found: dict[tuple[str, int | None], list[tuple[Any, Evaluation]]] = {}
    for task, result in kept:
        for e in read_evaluations(task.folder, result):
            found.setdefault((task.name, e.steps), []).append((result, e))
    return [ranking.join(recipe, [r for r, _ in parts], [e for _, e in parts]) for (recipe, _), parts in found.items()]
