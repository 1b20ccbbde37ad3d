"""`fewstep run`: train, sample, measure against the teacher and export."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fewstep.commands.claim import held, prepare, write_origin
from fewstep.commands.export import show_export
from fewstep.commands.judge import Judge, judge_of
from fewstep.commands.measure import guided_teacher, measure
from fewstep.commands.pictures import save_grid, save_side_by_side
from fewstep.commands.report import GRID, card_results, compare, console, first_teacher, show
from fewstep.commands.trust import allow_own_code, remember
from fewstep.config import UserError
from fewstep.eval.protocol.evaluation import Evaluation
from fewstep.export.choose import export
from fewstep.export.levels import check_product
from fewstep.files import commit
from fewstep.recipe.diff import differences
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load, load_run
from fewstep.train.product import open_product, product_of
from fewstep.train.resume import newest_of
from fewstep.train.trainer import Hooks, Trainer

STOPPING = b"\nstopping after this step, with a checkpoint; once more stops at once, without one\n"


def default_name(recipe: str) -> str:
    """The run directory of a recipe: toy/dmd2 -> toy-dmd2, some/where/mine.yaml -> mine."""
    return recipe.replace("/", "-") if recipe in shipped() else Path(recipe).stem


def run_recipe(
    name: str, settings: Sequence[str], out: Path | None, resume: bool, force: bool, start: Path | None = None
) -> Path:
    """`fewstep run`: train, sample, evaluate, export; `start` is the run or checkpoint to go on from."""
    recipe = load(name, settings)
    allow_own_code(name, settings, recipe)
    run = out or Path("runs") / default_name(name)
    begin = _beginning(start, run, resume)
    trainer = Trainer(recipe, None)  # builds every role: what is missing is said before the directory is claimed
    judge = _judge(trainer)
    if begin is not None:
        trainer.go_on_from(begin)
    main = trainer.accelerator.is_main_process
    with ExitStack() as stack:
        if main:
            stack.enter_context(held(run))
            prepare(recipe, run, resume, force)
            remember(run, recipe)
        trainer.accelerator.wait_for_everyone()
        trainer.attach(run)
        continued = resume and trainer.resume()
        if begin is not None:
            trainer.save()  # the run's first checkpoint: --resume finds it
        if main:
            console.print(f"[bold]{name}[/]: {recipe.about}")
            console.print(f"run directory {run}" + (f", continued at step {trainer.progress.done}" if continued else ""))
            if begin is not None:
                _say_beginning(begin, recipe, run, trainer.progress.done)
            if hasattr(trainer.data, "about"):
                console.print(trainer.data.about(), soft_wrap=True, highlight=False, markup=False)
            _say_export(trainer)
        again = shlex.join(["fewstep", "run", name, *settings, "--out", str(run), "--resume"])
        try:
            _train(trainer, run, main, judge)
        except KeyboardInterrupt:
            if main:
                console.print(
                    f"stopped at step {trainer.progress.done}; continue with: {again}",
                    soft_wrap=True,
                    highlight=False,
                    markup=False,
                )
            raise SystemExit(130) from None
        trainer.accelerator.wait_for_everyone()
        if main:
            finish(trainer, run, judge)
    trainer.accelerator.end_training()  # closes trackers and the process group, whose threads abort an open exit
    return run


def _beginning(start: Path | None, run: Path, resume: bool) -> Path | None:
    """The checkpoint of `--from`; UserError where it cannot begin a run in that directory."""
    if start is None:
        return None
    if resume:
        raise UserError("--from begins a run from another's weights, --resume continues one; give one of the two")
    checkpoint = newest_of(start)
    load_run(checkpoint.parent.parent)  # what changed since is said
    if run.exists() and checkpoint.resolve().is_relative_to(run.resolve()):
        raise UserError(f"--from {start}: lies in {run}, where the new run would be; choose another --out")
    return checkpoint


def _say_beginning(checkpoint: Path, recipe: Recipe, run: Path, done: int) -> None:
    changed = differences(load_run(checkpoint.parent.parent), recipe, all_keys=True)
    write_origin(run, checkpoint, changed)
    lines = "".join(f"\n  {line}" for line in changed) or " nothing"
    console.print(f"from {checkpoint} at step {done}; changed:{lines}", soft_wrap=True, highlight=False, markup=False)


def _judge(trainer: Trainer) -> Judge | None:
    """What measures the run; refuses before training what could not be measured after it."""
    recipe = trainer.recipe
    if recipe.evaluate is None:
        return None
    try:
        return judge_of(product_of(recipe, trainer.product, trainer.data, "student"), recipe.evaluate)
    except UserError as error:
        raise UserError(f"evaluate: {error}; give another metric, or evaluate=null to measure nothing") from None


def _say_export(trainer: Trainer) -> None:
    """A line before training where the export after it will be refused."""
    from fewstep.export.forecast import outlined, warning

    recipe = trainer.recipe
    built = partial(product_of, recipe, trainer.product, trainer.data, "student")
    # A sharded network is in parts that act together only; its recipe tells the same.
    told = warning(partial(outlined, recipe) if trainer.session.sharded else built)
    if told:
        console.print(f"note: this run {told}", soft_wrap=True, highlight=False, markup=False)


def _train(trainer: Trainer, run: Path, main: bool, judge: Judge | None) -> None:
    recipe = trainer.recipe

    def on_sample(t: Trainer) -> None:
        product = product_of(recipe, t.product.eval(), t.data, "student")
        x = product.draw(GRID, seed=0)
        if main:
            save_grid(x, run / "samples" / f"step-{t.progress.done:06d}.png")

    def on_eval(t: Trainer) -> None:
        if judge is None:
            return
        product = product_of(recipe, t.product.eval(), t.data, "student")
        row, _ = measure(product, judge)
        if t.log and main:
            t.log.write({"done": t.progress.done, "evaluation": row.as_json()["metrics"]})

    def on_stop(t: Trainer, again: bool) -> None:
        # Within a signal handler: print may be in the middle of its own work.
        os.write(2, b"\nstopping at once\n" if again else STOPPING)

    trainer.hooks = Hooks(on_sample, on_eval)
    if not main:
        trainer.fit()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("train", total=trainer.total_steps, completed=trainer.progress.done, losses="")
        every = max(1, trainer.total_steps // 10)

        def on_step(t: Trainer) -> None:
            text = readings(t.last_record)
            bar.update(task, completed=t.progress.done, losses=text)
            if not console.is_terminal and t.progress.done % every == 0:
                console.print(f"step {t.progress.done}/{t.total_steps}  {text}", soft_wrap=True, highlight=False)

        trainer.hooks = Hooks(on_sample, on_eval, on_step, on_stop=on_stop)
        trainer.fit()


def readings(record: dict[str, Any]) -> str:
    """The losses of a log record, short."""
    skip = ("grad_norm", "health/", "lr/", "done", "stage", "skips", "seconds")
    return "  ".join(f"{k} {v:.3g}" for k, v in record.items() if not k.startswith(skip))


def finish(trainer: Trainer, run: Path, judge: Judge | None) -> None:
    """Table, side-by-side picture, report and export of a finished run."""
    recipe = trainer.recipe
    if trainer.session.sharded:  # the parts act together only; this is one process
        student = open_product(run)
    else:
        student = product_of(recipe, trainer.product.eval(), trainer.data, "student", trainer.progress.done)
    steps = len(student.sampler.steps)
    role = "teacher" if student.sampler.kind == "ode" else "student"
    student = replace(student, title=f"{role}, {steps} step{'s' * (steps > 1)}")
    rows: list[Evaluation] = []
    if recipe.evaluate is not None and judge is not None:
        teacher = first_teacher(trainer)
        if teacher is not None:
            teacher = guided_teacher(teacher, recipe.evaluate.guidance, trainer.data.null)
        rows, panels = compare(student, judge, teacher, recipe.evaluate.teacher_steps)
        save_side_by_side(panels, run / "report" / "side-by-side.png")
        show(rows)
        told = {"recipe": recipe.about, "skips": trainer.progress.skipped, "commit": commit()[:7]}
        report = {"rows": [r.as_json() for r in rows], **told}
        (run / "report" / "results.json").write_text(json.dumps(report, indent=1))
        console.print(f"pictures {run / 'samples'}, side by side {run / 'report' / 'side-by-side.png'}")
    try:
        check_product(student)
        done = export(replace(student, title=run.name), run / "export", results=card_results(rows))
    except UserError as error:
        console.print(f"not exported: {error}")
        return
    show_export(done)
