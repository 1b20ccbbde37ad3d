"""One run of a comparison: train within the budget, measure, leave a result or the reason why there is none."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fewstep.algebra.draws import fold
from fewstep.algebra.guidance import guided_teacher
from fewstep.commands.compare.budget import Accounted, Budget, lengths, probe, with_lengths
from fewstep.commands.compare.curve import Curve, marks, read
from fewstep.commands.compare.kept import keep_arrays, result_of, steps_of, write_json
from fewstep.commands.compare.spent import peak_memory
from fewstep.commands.fitted_row import METHOD, NOISES, POINTS, fitted_teacher
from fewstep.commands.fitting import Wish
from fewstep.commands.judge import Judge, judge_of
from fewstep.commands.measure import measure, teacher_product
from fewstep.commands.progress import Watch
from fewstep.commands.sources import of_product
from fewstep.config import UserError, stated
from fewstep.eval.features.base import state_sha256
from fewstep.eval.protocol.evaluation import Evaluation, environment
from fewstep.eval.protocol.images import to_pixels
from fewstep.eval.protocol.latency import measure_latency
from fewstep.files import atomic_path, commit, dirty, file_sha256
from fewstep.networks import code
from fewstep.networks.denoiser import Rescheduled
from fewstep.recipe.diff import differences
from fewstep.recipe.schema import Evaluate, Recipe
from fewstep.recipe.store import dump, load, load_run
from fewstep.train.build import build_roles
from fewstep.train.claim import settled
from fewstep.train.fitted import NAME
from fewstep.train.product import Product, open_product, product_of
from fewstep.train.trainer import Trainer

SHOWN = 64
"""Samples of each student in the report."""
NEVER = (
    "train.sample_every=0",
    "train.eval_every=0",
    "train.keep=1",
    "train.guard=off",  # its samples would count as network calls
    "train.trackers=[]",
    "results=[]",
)


@dataclass(frozen=True)
class Task:
    """One run; or the measurement of a teacher (seed None), as it is or under fitted samplers, or of a fit's folder."""

    recipe: str
    folder: Path
    settings: tuple[str, ...]
    budget: Budget
    evaluation: Evaluate
    steps: tuple[int, ...]
    seed: int | None
    place: str = ""
    """Shown in front of what is printed, such as [3/62]."""
    counts: tuple[int, ...] = ()
    """Numbers of calls that the recipe's teacher is fitted for."""
    fit: Path | None = None
    """A folder by `fewstep fit`, measured as the recipe's students are."""
    points: int = 0
    """Points of its curve over its last stage, the end among them; 0: none but the end."""

    def load(self) -> Recipe:
        seed = () if self.seed is None else (f"train.seed={self.seed}",)
        recipe = settled(load(self.recipe, [*self.settings, *seed, *NEVER]))
        code.allow(recipe)  # `compare` has asked before it made tasks
        return replace(recipe, evaluate=self.evaluation)

    @property
    def name(self) -> str:
        """What its rows are called."""
        return self.recipe if self.fit is None else str(self.fit)

    @property
    def title(self) -> str:
        if self.fit is not None:
            return f"{self.place} {self.fit}, a fit"
        kind = f"seed {self.seed}" if self.seed is not None else "teacher fitted" if self.counts else "teacher"
        return f"{self.place} {self.recipe}, {kind}"

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    def kept(self) -> dict[str, Any] | None:
        """Its result, None where it is to be made, as a teacher's is that lacks a number of steps."""
        found = result_of(self.folder, self.seed is None)
        if found is None or self.seed is not None or self.fit is not None:
            return found
        # On its own grid a teacher may have more or fewer levels than were asked for.
        had = found.get("asked") or [row["steps"] for row in found["rows"]]
        known = self.evaluation.teacher_grid == "own" and "asked" not in found
        return found if known or set(had).issuperset(self.asked) else None

    @property
    def asked(self) -> tuple[int, ...]:
        """Numbers of steps, or of calls, of a teacher's rows."""
        return self.counts or tuple(self.evaluation.teacher_steps)

    @property
    def failure(self) -> Path:
        return self.folder / "failure.json"


def say(text: str) -> None:
    print(text, flush=True)


def work(task: Task) -> None:
    """Train and measure one run, or measure a teacher; leaves result.json, or failure.json with the message."""
    try:
        task.failure.unlink(missing_ok=True)
        if task.fit is not None:
            score_fit(task)
        elif task.seed is None:
            score_teacher(task)
        else:
            train(task)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        message = str(error) or type(error).__name__
        if not isinstance(error, (UserError, ValueError)):
            message = f"{type(error).__name__}: {message}"
        write_json(task.failure, {"message": message, "traceback": traceback.format_exc()})


def train(task: Task) -> None:
    """Train one run from where it stands, then measure it at its numbers of steps."""
    run, shared = task.folder, task.folder.parent
    banks = shared.parent / "banks"
    recipe = task.load()
    final = with_lengths(recipe, planned(task, recipe, banks))
    run.mkdir(parents=True, exist_ok=True)
    if (run / "recipe.yaml").is_file():
        refuse_changes(run, final)
    with atomic_path(run / "recipe.yaml") as temporary:
        temporary.write_text(dump(final))
    length = [stage.steps for stage in final.stages()]
    total = sum(length)
    told: list[Watch] = []

    @cache
    def judge() -> Judge:
        return judge_of(product_of(final, account.trainer.product, account.trainer.data, task.recipe), task.evaluation)

    def distance() -> float:
        trainer = account.trainer
        now = product_of(final, trainer.product.eval(), trainer.data, task.recipe)
        return measure(now, judge().of_distance(), timed=False)[0].distance.value

    curve = Curve(run / "curve.jsonl", marks(length, task.points), distance) if task.points else None

    def watch(account: Accounted) -> None:
        orphaned()
        done = account.trainer.progress.done
        if curve:
            curve.add(account)
        if not told:
            told.append(Watch(total, done - 1))
        if told[0].due(done) and done < total:
            say(f"{task.title}: {told[0].line(done, '')}")

    account = Accounted(final, run, task.budget, banks=banks, watch=watch)
    account.resume()
    if curve:
        curve.cut(account.trainer.progress.done)
    account.fit()
    trainer, spent = account.trainer, account.spent
    product = product_of(final, trainer.product.eval(), trainer.data, task.recipe, trainer.progress.done)
    found = [score(product.with_steps(n), judge(), task.title) for n in step_counts(product, task.steps)]
    keep_arrays(run, found)
    method: Any = final.method
    cost = {"seconds": spent.seconds, "cpu_seconds": spent.cpu_seconds, "network_calls": spent.calls}
    own = next((e for e in found if e.steps == len(product.sampler.steps)), found[-1])
    env = environment() | {"commit": commit() + "-dirty" * dirty()}
    end = {"updates": trainer.progress.done, **cost, "value": own.distance.value}
    write_json(
        task.result,
        {
            "recipe": task.recipe,
            "method": method.name,
            "seed": task.seed,
            "settings": list(task.settings),
            "budget": str(task.budget),
            "commit": env["commit"],
            "environment": env,
            "identity": identity(recipe),
            "teacher": teacher_of(final, trainer),
            "resumes": spent.resumes,
            "own_steps": len(product.sampler.steps),
            "updates": trainer.progress.done,
            "planned_updates": total,
            "refused_updates": trainer.progress.skipped,
            **cost,
            "peak_memory_mib": spent.peak_memory_mib,
            "curve": [*read(run / "curve.jsonl"), end] if curve else [],
            "rows": [e.as_json() for e in found],
        },
    )


def teacher_of(recipe: Recipe, trainer: Trainer) -> dict[str, str] | None:
    """Path and digest of the weights that a teacher was opened with; None for one that the run trains."""
    path = getattr(recipe.teacher, "path", None)
    if path is None or recipe.fills_teacher():
        return None
    net: Any = trainer.roles.teacher
    while isinstance(net, Rescheduled):  # the same weights, named one level deeper
        net = net.denoiser
    return {"path": str(path), "sha256": state_sha256(net)}


def planned(task: Task, recipe: Recipe, banks: Path) -> list[int]:
    """Steps per stage, the same for every seed: written by the first run of a recipe, read by the others."""
    path = task.folder.parent / "lengths.json"
    found = steps_of(path, identity(recipe), len(recipe.stages()))
    if found is not None:
        return found
    costs = () if task.budget.in_steps else probe(recipe, task.budget, banks)
    steps = lengths(recipe, task.budget, costs)
    write_json(path, {"recipe": identity(recipe), "steps": steps, "costs": list(costs)})
    return steps


def identity(recipe: Recipe) -> str:
    """A digest of everything in the recipe but its seed, what is measured, and what it tells of other runs."""
    data = stated(recipe)
    data["train"].pop("seed")
    for key in ("about", "results", "expected", "evaluate"):
        data.pop(key, None)
    return f"{fold(json.dumps(data, sort_keys=True, default=str)) % 2**64:016x}"


def refuse_changes(run: Path, recipe: Recipe) -> None:
    """UserError when the run in this folder was started with another recipe."""
    stored = load_run(run)
    if len(stored.before) == len(recipe.before):
        recipe = with_lengths(recipe, [stage.steps for stage in stored.stages()])
    if changed := differences(stored, recipe):
        raise UserError(
            f"{run}: was trained with another recipe; delete {run.parent} to train it again:\n  " + "\n  ".join(changed)
        )


def orphaned() -> None:
    """Leave when the process that compares is gone: a second one may be at work in the same folders."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)


def step_counts(product: Product, wanted: Sequence[int]) -> list[int]:
    """The student's own numbers of steps, and of the wanted ones those that it allows."""
    own = product.trained or (len(product.sampler.steps),)
    return sorted({*own, *(n for n in wanted if product.trained is None or n in product.trained)})


def score(product: Product, judge: Judge, title: str) -> Evaluation:
    """Measure a product; also its first pictures and its latency. Lines of how far it is begin with the title."""
    evaluation, x = measure(product, judge, say=lambda text: say(f"{title}: {text}"))
    number = judge.preset.number
    make = of_product(judge.preset, product, product.title).generate(0)

    def generate(indices: list[int]) -> torch.Tensor:
        # A small set has fewer conditions than the clock asks for.
        return make([i % number for i in indices])

    latency = tuple(measure_latency(generate, batch, repeats=5, warm_up=1) for batch in (1, SHOWN))
    return replace(evaluation, images=to_pixels(x[:SHOWN]) if x.ndim == 4 else None, latency=latency)


def score_teacher(task: Task) -> None:
    """Measure a recipe's teacher at the evaluation's numbers of Heun steps."""
    recipe = task.load()
    data: Any = recipe.data.open()
    roles = build_roles(recipe, data)
    student = product_of(recipe, roles.student.eval(), data, task.recipe)
    judge = judge_of(student, task.evaluation)
    teacher = guided_teacher(roles.teacher, task.evaluation.guidance, data.null)
    told: dict[str, Any] = {}
    if task.counts:
        wish = Wish(calls=task.counts, points=POINTS, noises=NOISES)
        drawn, done = fitted_teacher(student, teacher, wish)
        told = {"method": METHOD, "updates": 0, "network_calls": done.calls, "seconds": done.seconds}
    else:
        drawn = [teacher_product(student, teacher, n) for n in task.evaluation.teacher_steps]
    rows = []
    for product in drawn:
        orphaned()
        rows.append(replace(score(product, judge, task.title), training=told))
    keep_arrays(task.folder, rows)
    write_json(task.result, {"recipe": task.recipe, "asked": task.asked, "rows": [e.as_json() for e in rows]})


def score_fit(task: Task) -> None:
    """Measure a fit's folder at its numbers of calls, as a run without updates."""
    recipe = task.load()
    assert task.fit is not None
    product = open_product(task.fit)
    fitted = product.fitted
    assert fitted is not None
    like = product_of(recipe, torch.nn.Identity(), recipe.data.open(), task.recipe)  # type: ignore[arg-type]
    if (product.shape, product.classes) != (like.shape, like.classes):
        raise UserError(
            f"{task.fit}: draws {list(product.shape)} of {product.classes} classes, {task.recipe} "
            f"{list(like.shape)} of {like.classes}; they cannot stand in one table"
        )
    if like.prompted is not None and product.prompted is None:
        raise UserError(f"{task.fit}: knows no prompts, {task.recipe} does; they cannot stand in one table")
    judge = judge_of(like, task.evaluation)
    rows = []
    for n in fitted.counts:
        orphaned()
        like_it = replace(product.with_steps(n), prompted=like.prompted, paired=like.paired)
        rows.append(score(like_it, judge, task.title))
    keep_arrays(task.folder, rows)
    write_json(
        task.result,
        {
            "recipe": task.name,
            "method": METHOD,
            "seed": None,
            "settings": [],
            "budget": str(task.budget),
            "commit": fitted.commit,
            "updates": 0,
            "planned_updates": 0,
            "fit": file_sha256(task.fit / NAME),
            "refused_updates": 0,
            "seconds": fitted.seconds,
            "cpu_seconds": fitted.seconds,
            "network_calls": fitted.calls,
            "peak_memory_mib": peak_memory(),
            "rows": [e.as_json() for e in rows],
        },
    )
