"""`fewstep run`: train, sample, measure against the teacher and export."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.commands.claim import prepare
from fewstep.commands.finish import finish, guarded, say_peak, say_success
from fewstep.commands.judge import Judge, judge_of
from fewstep.commands.measure import measure
from fewstep.commands.memory import explained
from fewstep.commands.pictures import beside, save_grid
from fewstep.commands.progress import TrainingBar, Watch, alarmed, embedding_lines, readings
from fewstep.commands.report import GRID, console, say
from fewstep.commands.trust import allow_own_code
from fewstep.config import UserError
from fewstep.data.latents import vae_folder
from fewstep.data.placed import encoding
from fewstep.eval.protocol.evaluation import distance_of, environment
from fewstep.networks import code
from fewstep.networks.components import examine
from fewstep.recipe.diff import differences
from fewstep.recipe.pinned import repositories
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load, load_run
from fewstep.recipe.success import MEASURED, parse
from fewstep.train.claim import held, read_origin, settled, write_origin
from fewstep.train.guard import Stopped
from fewstep.train.log import read_log
from fewstep.train.peak import peak
from fewstep.train.product import product_of
from fewstep.train.resume import newest_of
from fewstep.train.trainer import Hooks, Trainer

LATENTS = 16
"""Samples of a grid where a VAE decodes each of them."""
GUARDED = 4
"""Exit code of a run that `train.guard` has ended."""
STOPPING = b"\nstopping after this step, with a checkpoint; once more stops at once, without one\n"


def default_name(recipe: str) -> str:
    """The run directory of a recipe: toy/dmd2 -> toy-dmd2, some/where/mine.yaml -> mine."""
    return recipe.replace("/", "-") if recipe in shipped() else Path(recipe).stem


def run_recipe(
    name: str,
    settings: Sequence[str],
    out: Path | None,
    resume: bool,
    force: bool,
    start: Path | None = None,
    download: bool = False,
) -> Path:
    """`fewstep run`: train, sample, export, evaluate; `start` is the run or checkpoint to go on from.

    download: as `fewstep.train.claim.settled` takes it.

    SystemExit with the code of `finish` where that failed, with GUARDED where `train.guard` ended it.
    """
    recipe = load(name, settings)
    allow_own_code(name, settings, recipe)
    run = out or Path("runs") / default_name(name)
    begin = _beginning(start, run, resume)
    recipe = settled(recipe, run if resume else None, download=download)
    # Builds every role: what is missing is said before the directory is claimed.
    with explained(name, settings, recipe, run, start=start), encoding(told=embedding_lines(say)):
        trainer = Trainer(recipe, None)
        if vae := getattr(recipe.data, "vae", None):
            examine(vae_folder(vae), f"vae {vae}")
    judge = _judge(trainer)
    if begin is not None:
        trainer.go_on_from(begin)
    main = trainer.accelerator.is_main_process
    with ExitStack() as stack:
        if main:
            stack.enter_context(held(run))
            prepare(recipe, run, resume, force)
        trainer.accelerator.wait_for_everyone()
        trainer.attach(run)
        continued = resume and trainer.resume()
        if begin is not None:
            trainer.save()  # the run's first checkpoint: --resume finds it
        if main:
            console.print(f"[bold]{name}[/]: {recipe.about}")
            console.print(f"run directory {run}" + (f", continued at step {trainer.progress.done}" if continued else ""))
            for repo in repositories(recipe):
                console.print(f"{repo.name} of the Hugging Face hub at {repo.revision}", soft_wrap=True, highlight=False)
            changed = [] if begin is None else _say_beginning(begin, recipe, trainer)
            write_origin(run, {**read_origin(run), **_origin(name, settings, begin, changed)})
            if hasattr(trainer.data, "about"):
                say(trainer.data.about())
            for line in trainer.changed if continued else ():
                say(f"note: {line}")
            _say_export(trainer)
        more = ["--out", str(run), "--resume", *code.words(recipe)]
        again = shlex.join(["fewstep", "run", name, *settings, *more])
        try:
            with explained(name, settings, recipe, run, trainer.accelerator.num_processes, start):
                _train(trainer, run, main, judge)
        except KeyboardInterrupt:
            if main:
                say(f"stopped at step {trainer.progress.done}; continue with: {again}")
            raise SystemExit(130) from None
        except Stopped as stopped:
            if main:
                _say_best(recipe, run)
                say(f"{stopped}. Look at it with: {shlex.join(['fewstep', 'health', str(run)])}; {_ways_on(run)}")
            raise SystemExit(GUARDED) from None
        trainer.accelerator.wait_for_everyone()
        unfinished = finish(trainer, run, judge) if main else 0
    trainer.accelerator.end_training()  # closes trackers and the process group, whose threads abort an open exit
    if unfinished:
        raise SystemExit(unfinished)
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


def _ways_on(run: Path) -> str:
    """What can be done with a run that its guard has ended."""
    commands = [shlex.join(["fewstep", verb, str(run)]) for verb in ("eval", "export")]
    return f"measure or export its newest checkpoint with: {', '.join(commands)}"


def _say_best(recipe: Recipe, run: Path) -> None:
    """Where a run that its guard has ended was best, and that nobody knows whether it has succeeded."""
    say_peak(run, peak(read_log(run / "log.jsonl")))
    if recipe.success is not None:
        say_success({"asked": str(parse(recipe.success)), "value": None, "met": False})


def _say_beginning(checkpoint: Path, recipe: Recipe, trainer: Trainer) -> list[str]:
    changed = [*differences(load_run(checkpoint.parent.parent), recipe, all_keys=True), *trainer.changed]
    lines = "".join(f"\n  {line}" for line in changed) or " nothing"
    say(f"from {checkpoint} at step {trainer.progress.done}; changed:{lines}")
    return changed


def _origin(name: str, settings: Sequence[str], begin: Path | None, changed: Sequence[str]) -> dict[str, Any]:
    """What origin.json says of a run that begins or is continued."""
    told = {"recipe": name, "settings": list(settings), "environment": environment()}
    return told if begin is None else {**told, "from": str(begin), "changed": list(changed)}


def _judge(trainer: Trainer) -> Judge | None:
    """What measures the run; refuses before training what could not be measured after it."""
    recipe = trainer.recipe
    if recipe.evaluate is None:
        return None
    try:
        judge = judge_of(product_of(recipe, trainer.product, trainer.data, "student"), recipe.evaluate)
    except UserError as error:
        raise UserError(f"evaluate: {error}; give another metric, or evaluate=null to measure nothing") from None
    if recipe.success is not None:
        asked = parse(recipe.success)
        metrics = judge.preset.metrics
        if not any(m.startswith(MEASURED[asked.metric]) for m in metrics):
            raise UserError(f"success: {asked}: preset {judge.preset.name} measures {', '.join(metrics)} alone")
    return judge


def _say_export(trainer: Trainer) -> None:
    """A line before training where the export after it will be refused."""
    from fewstep.export.forecast import outlined, warning

    recipe = trainer.recipe
    built = partial(product_of, recipe, trainer.product, trainer.data, "student")
    # A sharded network is in parts that act together only; its recipe tells the same.
    told = warning(partial(outlined, recipe) if trainer.session.sharded else built)
    if told:
        say(f"note: this run {told}")


def _train(trainer: Trainer, run: Path, main: bool, judge: Judge | None) -> None:
    recipe = trainer.recipe

    def on_sample(t: Trainer) -> None:
        product = product_of(recipe, t.product.eval(), t.data, "student")
        # No more at once than a step trains on, which is what was planned for.
        batch = max(1, recipe.train.batch // t.accelerator.num_processes // recipe.train.accumulate)
        count, per_row = (GRID, 10) if product.vae is None else (LATENTS, 4)
        x = product.draw(count, seed=0, batch=batch)
        if main:
            sheet = beside(product, x)
            save_grid(sheet, run / "samples" / f"step-{t.progress.done:06d}.png", per_row if sheet is x else 12)

    def on_eval(t: Trainer) -> float | None:
        if judge is None:
            return None
        product = product_of(recipe, t.product.eval(), t.data, "student")
        row, _ = measure(product, judge)
        if t.log and main:
            t.log.write({"done": t.progress.done, "evaluation": row.as_json()["metrics"]})
        return row.distance.value if distance_of(row) else None

    def on_stop(t: Trainer, again: bool) -> None:
        # Within a signal handler: print may be in the middle of its own work.
        os.write(2, b"\nstopping at once\n" if again else STOPPING)

    # On every process: what each of them reads is averaged into one record.
    if judge is not None and trainer.guard.readings is not None and getattr(recipe.data, "vae", None) is None:
        trainer.guard.readings.features = judge.features
    if not main:
        trainer.hooks = Hooks(guarded("picture", on_sample), guarded("evaluation", on_eval))
        trainer.fit()
        return
    total, done = trainer.total_steps, trainer.progress.done
    watch = Watch(total, done)
    with TrainingBar(console, total, done) as bar:
        alarms = [""]

        def on_step(t: Trainer) -> None:
            if watch.due(t.progress.done) and t.log:
                alarms[0] = alarmed(read_log(t.log.path))
            if console.is_terminal:
                bar.show(t.progress.done, "  ".join(p for p in (alarms[0], readings(t.last_record)) if p))
            elif watch.due(t.progress.done):
                told = (readings(t.last_record or t.loop.meter.means()), alarms[0])
                text = watch.line(t.progress.done, "  ".join(p for p in told if p))
                console.print(text, soft_wrap=True, highlight=False)

        trainer.hooks = Hooks(
            guarded("picture", on_sample), guarded("evaluation", on_eval), on_step, on_guard=say, on_stop=on_stop
        )
        trainer.fit()
