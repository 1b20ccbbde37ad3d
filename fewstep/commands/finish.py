"""After a training: export first, then measure, draw and report. What fails here costs no training."""

from __future__ import annotations

import json
import shlex
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.nn.functional as F

from fewstep.algebra.guidance import guided_teacher
from fewstep.commands.export import show_export
from fewstep.commands.fitted_row import calls_of, fitted_teacher, wish_for
from fewstep.commands.judge import Judge
from fewstep.commands.pictures import save_side_by_side
from fewstep.commands.report import card_peak, card_results, compare, console, first_teacher, measure_and_tell, say, show
from fewstep.config import UserError
from fewstep.eval.protocol.evaluation import Evaluation
from fewstep.export.base import Exported, ExportRefused
from fewstep.export.choose import export
from fewstep.export.forecast import foretold
from fewstep.export.levels import check_product
from fewstep.files import atomic_path, commit
from fewstep.recipe.schema import Recipe
from fewstep.recipe.success import parse
from fewstep.train.assisted import assisted
from fewstep.train.log import read_log
from fewstep.train.peak import Peak, peak
from fewstep.train.product import Product, open_product, product_of
from fewstep.train.state import checkpoints
from fewstep.train.trainer import Trainer

T = TypeVar("T")
UNFINISHED = 3
"""Exit code of a run that trained to its end, but whose measurement, pictures or export then failed."""


def finish(trainer: Trainer, run: Path, judge: Judge | None) -> int:
    """Export, table, side-by-side picture and report of a trained run; the exit code, 0 or UNFINISHED.

    An error becomes one line with the command that repeats what failed, its traceback a file in RUN/report.
    """
    recipe, code = trainer.recipe, 0
    if trainer.session.sharded:  # the parts act together only; this is one process
        student = open_product(run)
    else:
        student = product_of(recipe, trainer.product.eval(), trainer.data, run.name, trainer.progress.done)
    done: Exported | None = None
    refused = ""
    best = peak(read_log(run / "log.jsonl"))
    try:
        check_product(student)
        done = export(student, run / "export", results=card_peak(best))
    except ExportRefused as refusal:
        refused = f"not exported: {refusal}"
    except Exception as error:
        code = UNFINISHED
        refused = f"{_failed(run, 'export', error)}; again with: {shlex.join(['fewstep', 'export', str(run)])}"
    if judge is not None and recipe.evaluate is not None:
        again = evaluation_of(trainer, run)
        try:
            rows = _measure(trainer, student, run, judge, best)
            if done is not None:
                _write_card(student, done, rows, best)
        except KeyboardInterrupt:
            code = 130
            say(f"measuring was stopped, the run is trained; measure it with: {again}")
        except Exception as error:
            code = UNFINISHED
            say(f"{_failed(run, 'evaluation', error)}; the run is trained, measure it again with: {again}")
    say_peak(run, best)
    if done is not None:
        show_export(done)
    else:
        say(refused)
    if closing := refused_updates(trainer):
        say(closing)
    return code


def say_peak(run: Path, best: Peak | None) -> None:
    if best is not None:
        say(f"{best}; checkpoints kept: {', '.join(p.name for p in checkpoints(run / 'checkpoints'))}")


def refused_updates(trainer: Trainer) -> str | None:
    """The closing word on updates refused for non-finite gradients; None where there were none."""
    skipped = trainer.progress.skipped
    if not skipped:
        return None
    last = {"+".join(o.names): (o.skipped, o.skipped + o.updates) for o in trainer.loop.optim.values()}
    mostly = {name: n for name, n in last.items() if 2 * n[0] >= n[1] > 0}
    said = f"{skipped} updates were refused, their gradients were not finite"
    if not mostly:
        return f"note: {said}"
    shares = ", ".join(f"{a} of {b} of {name}" for name, (a, b) in mostly.items())
    return (
        f"warning: {said}: {shares} in the last stage. What was trained is hardly more than its start; lower optim.*.lr "
        "or train.clip, or use train.precision=fp32, and train again"
    )


def succeeded(recipe: Recipe, row: Evaluation) -> dict[str, Any] | None:
    """What results.json says of the recipe's `success`; None where it has none."""
    if recipe.success is None:
        return None
    asked = parse(recipe.success)
    value = asked.value(row.metrics)
    return {"asked": str(asked), "value": value, "met": value is not None and asked.met(value)}


def say_success(told: Mapping[str, Any]) -> None:
    value = "was not measured" if told["value"] is None else f"is {told['value']:.4g}"
    say(f"{'success' if told['met'] else 'no success'}: {told['asked']} was asked for, it {value}")


def evaluation_of(trainer: Trainer, run: Path) -> str:
    """The command that measures a run as its recipe says."""
    spec = trainer.recipe.evaluate
    teacher = trainer.recipe.teacher is not None and spec is not None and spec.teacher_steps
    steps = ["--teacher", ",".join(map(str, spec.teacher_steps))] if teacher and spec else []
    return shlex.join(["fewstep", "eval", str(run), *steps])


def _measure(trainer: Trainer, student: Product, run: Path, judge: Judge, best: Peak | None) -> list[Evaluation]:
    """The student beside its teacher: table, pictures and results.json."""
    spec: Any = trainer.recipe.evaluate
    steps = len(student.sampler.steps)
    role = "teacher" if student.sampler.kind == "ode" and trainer.recipe.teacher is None else "student"
    student = replace(student, title=f"{role}, {steps} step{'s' * (steps > 1)}")
    first = first_teacher(trainer)
    teacher = None if first is None else guided_teacher(first, spec.guidance, trainer.data.null)
    rows, panels = compare(student, judge, teacher, spec.teacher_steps)
    rows[-1:-1] = _fitted(trainer.recipe, student, teacher, judge)
    if spec.assist is not None and first is not None:
        rows[-1:-1] = [measure_and_tell(assisted(student, spec.assist, first, trainer.data.null), judge)[0]]
    show(rows)
    told = {"recipe": trainer.recipe.about, "skips": trainer.progress.skipped, "commit": commit()[:7]}
    success = succeeded(trainer.recipe, rows[-1])
    more = {"peak": asdict(best) if best else None, "success": success}
    report = {"rows": [r.as_json() for r in rows], **told, **{k: v for k, v in more.items() if v is not None}}
    with atomic_path(run / "report" / "results.json") as aside:
        aside.write_text(json.dumps(report, indent=1))
    if student.paired is not None:
        pairs = student.paired(len(panels[-1][1]))
        given = F.interpolate(pairs.given, pairs.truth.shape[-2:], mode="nearest")
        panels = [("given", given), *panels, ("truth", pairs.truth)]
    save_side_by_side(panels, run / "report" / "side-by-side.png")
    if success is not None:
        say_success(success)
    console.print(f"pictures {run / 'samples'}, side by side {run / 'report' / 'side-by-side.png'}")
    return rows


def _fitted(recipe: Recipe, student: Product, teacher: Any, judge: Judge) -> list[Evaluation]:
    """The row of the fitted teacher; none where it is not wanted, or where it fails, which costs nothing else."""
    try:
        assert recipe.evaluate is not None
        wish = wish_for(recipe.evaluate, recipe.teacher, [len(student.sampler.steps)], calls_of(recipe))
        if wish is None or student.sampler.kind == "ode":
            return []
        found, done = fitted_teacher(student, teacher, wish)
        say(f"teacher fitted for {wish.calls[0]} calls with {done.calls:,} network calls, to stand beside the student")
        return [measure_and_tell(p, judge)[0] for p in found]
    except Exception as error:
        say(f"note: the teacher was not fitted: {type(error).__name__}: {error}; evaluate.fitted=false leaves it out")
        return []


def _write_card(student: Product, done: Exported, rows: list[Evaluation], best: Peak | None) -> None:
    """The card of a finished export again, with what was measured after it and where the run was best."""
    card = foretold(student).card(done.usage, done.parity, [*card_results(rows), *card_peak(best)])
    with atomic_path(done.folder / "README.md") as aside:
        aside.write_text(card)


def _failed(run: Path, what: str, error: Exception) -> str:
    """One line of an error. That of a mistake of the user's says all; others leave their traceback in a file."""
    line = (str(error).splitlines() or [""])[0]
    if isinstance(error, UserError):
        return f"{what} failed: {line}"
    try:
        file = run / "report" / f"{what}-error.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(traceback.format_exception(error)))
        where = f" (traceback in {file})"
    except OSError:  # a full disk is why it failed
        where = ""
    return f"{what} failed: {type(error).__name__}: {line}{where}"


def guarded(what: str, hook: Callable[[Trainer], T]) -> Callable[[Trainer], T | None]:
    """A hook whose failure is one line: neither a picture nor a number on the way is worth a training."""

    def call(trainer: Trainer) -> T | None:
        try:
            return hook(trainer)
        except Exception as error:
            assert trainer.run is not None
            say(f"step {trainer.progress.done}: {_failed(trainer.run, what, error)}; training goes on")
            return None

    return call
