"""A loop's checkpoint, and a loop put where its newest checkpoint stands."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fewstep.config import UserError
from fewstep.networks.routed import innermost, source_of
from fewstep.recipe.schema import Recipe, Stage
from fewstep.recipe.store import load_run
from fewstep.train.build import trained_roles
from fewstep.train.guard import Guard, best_of
from fewstep.train.loop import Loop
from fewstep.train.origins import changes, check_resumed
from fewstep.train.state import (
    Progress,
    checkpoints,
    is_sound,
    load_checkpoint,
    no_best,
    read_guard,
    read_origins,
    read_state,
    save_checkpoint,
    set_aside,
    sweep,
)


def save(loop: Loop, run: Path, guard: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint on the main process, with what the guard knows of it; the stage's best one stays as well."""
    session, progress = loop.session, loop.progress
    progress.optim = {k: {"updates": o.updates, "skipped": o.skipped} for k, o in loop.optim.items()}
    progress.ema = {e.name: e.updates for e in session.ema}
    progress.meter = session.means(loop.meter.values())
    adams = {k: o.adam for k, o in loop.optim.items()}
    main = session.accelerator.is_main_process
    if main or session.sharded:
        parts = main if session.sharded else None
        keep = session.recipe.train.keep
        sound = not any(o.in_a_row for o in loop.optim.values())
        there = run / "checkpoints"
        best = best_of if guard else no_best
        save_checkpoint(there, session.modules(), adams, progress, keep, parts, sound, session.origins, guard, best)
    session.accelerator.wait_for_everyone()


def resume(loop: Loop, run: Path) -> list[str] | None:
    """Continue from the newest complete checkpoint; None when there is none, else lines about what has changed since.

    UserError where the run would go on with another teacher or text encoder.
    """
    found = checkpoints(run / "checkpoints")
    if not found:
        return None
    session = loop.session
    changed = check_resumed(session.recipe, read_origins(found[-1]), session.origins, run)
    load(loop, found[-1], run)
    return changed


def go_back(loop: Loop, checkpoint: Path, run: Path) -> None:
    """Put a loop that trains where an earlier checkpoint of its stage stands, and take later ones off the list.

    A kill in between leaves the later ones or none of them: either way the run comes to the same return again.
    """
    session = loop.session
    session.accelerator.wait_for_everyone()
    if session.accelerator.is_main_process:
        for late in reversed(checkpoints(checkpoint.parent)):
            if late.name > checkpoint.name:
                set_aside(late)
        sweep(checkpoint.parent)
    session.accelerator.wait_for_everyone()
    stand_at(loop, checkpoint, run)


def stand_at(loop: Loop, checkpoint: Path, run: Path) -> None:
    """Load an earlier checkpoint of the stage into a loop that trains."""
    session = loop.session
    for optimizer in loop.optim.values():
        optimizer.zero()  # a step that was refused on its way leaves gradients, which the next would add to
    loop.optim.clear()
    # Where the stage has yet to begin, the checkpoint has none of its buffers.
    session.roles = session.roles.with_state(None)
    load(loop, checkpoint, run)


def end_at_best(loop: Loop, run: Path | None, guard: Guard, stage: int) -> int | None:
    """At the end of a training that went back: the best checkpoint, where the end is no better; its step, or None.

    The score of the end is then that checkpoint's.
    """
    if run is None or guard.mode != "restore" or not guard.acts:
        return None
    end = loop.progress
    found = best_of(run / "checkpoints", stage)
    mark = (read_guard(found) if found else None) or {}
    # What is measured is known to the main process alone.
    worse = loop.session.any(bool(mark) and guard.worse(end.done, stage, mark))
    if found is None or not worse:
        return None
    stand_at(loop, found, run)
    guard.ended = (end.done, mark)
    now, best = loop.progress, loop.progress.done
    now.stage, now.step, now.done, now.skipped = end.stage, end.step, end.done, end.skipped
    return best


def go_on_from(loop: Loop, checkpoint: Path) -> list[str]:
    """Start from another run's checkpoint with this recipe's settings: weights, moments, averages and step counts.

    Returns lines about files that are others than that run's. UserError where roles, networks, averages or the
    optimised sets differ: only settings that change none of them may.
    """
    run = checkpoint.parent.parent
    if (run / "recipe.yaml").is_file() and (wrong := refuses(loop.session.recipe, load_run(run))):
        raise UserError(f"{run}: {wrong}")
    load(loop, checkpoint, run, fresh=untrained(loop.session.recipe))
    if loop.progress.stage >= len(loop.session.recipe.stages()):
        raise UserError(f"{checkpoint}: stands at the end of the run, so nothing would be trained; raise train.steps")
    # Readings that the other settings made are not this run's.
    loop.meter.restore({})
    return list(changes(loop.session.recipe, read_origins(checkpoint), loop.session.origins).values())


def refuses(recipe: Recipe, other: Recipe) -> str:
    """Why a checkpoint of another recipe cannot begin this one, as far as the two tell; "" where its weights decide."""
    own, theirs = (
        [(s.method.name, s.steps, dict(s.copy)) for s in r.before] + [(r.method.name, 0, dict(r.copy))]
        for r in (recipe, other)
    )
    if own != theirs:
        # A checkpoint stands in a stage: those up to its last, and their lengths, are the other recipe's too.
        told = ", ".join([*(f"{k} steps of {n}" for n, k, _ in theirs[:-1]), theirs[-1][0]])
        return (
            f"its stages are others ({told}), so its checkpoint stands nowhere in this recipe; leave `before`, "
            "`copy` and the method's name as they were"
        )
    for role in trained_roles(recipe):
        if role not in other.role_names():
            if role in untrained(recipe):
                continue
            return f"has no role {role}, which this recipe trains"
        kinds = [getattr(r.spec(role), "name", role) for r in (recipe, other)]
        if any((kinds[0] == own) != (kinds[1] == own) for own in ("controlnet", "lora")):
            return f"its {role} is {kinds[1]}, this recipe's {kinds[0]}, which has other weights; leave it as it was"
    if set(recipe.train.ema) != set(other.train.ema):
        return f"has the averages train.ema={list(other.train.ema)}, this recipe {list(recipe.train.ema)}; leave them so"
    for role in set().union(*(s.method.needs().trained for s in recipe.stages())):
        now, then = ({"rule": o.rule, "bits": o.bits} for o in (recipe.optimizer(role), other.optimizer(role)))
        if now != then:
            return f"its moments of {role} are of optim {then}, this recipe's of {now}; leave rule and bits so"
    return ""


def untrained(recipe: Recipe) -> set[str]:
    """Roles besides the teacher that no stage trains or copies into and no other role is made of: a reward, LPIPS."""
    used = {role for stage in recipe.stages() for role in (*stage.method.needs().trained, *stage.copy)}
    for spec in map(recipe.spec, recipe.role_names()):
        used |= {source_of(spec) or "", *getattr(innermost(spec), "beside", ())}
    return set(trained_roles(recipe)) - used


def newest_of(path: Path) -> Path:
    """The checkpoint that a path names: itself, or a run directory's newest sound one. UserError when it is neither."""
    if (path / "state.json").is_file():
        return path
    found = checkpoints(path / "checkpoints")
    if found:
        # What was saved while updates were refused is what one wants to get away from.
        return next((p for p in reversed(found) if is_sound(p)), found[-1])
    step = path.parent / "checkpoints" / path.name
    if (step / "state.json").is_file():
        return step
    held = [p.name for p in checkpoints(path.parent / "checkpoints")]
    there = f"; the run has {', '.join(held)}" if held else ""
    raise UserError(f"{path}: is neither a run directory with a checkpoint nor one{there}")


def load(loop: Loop, checkpoint: Path, run: Path, fresh: Collection[str] = ()) -> None:
    """Weights, moments, averages, counts and readings of a checkpoint of this recipe.

    fresh: roles that stay as they were built where it does not hold them.
    """
    session = loop.session
    progress, held = read_state(checkpoint)
    stages = session.recipe.stages()
    _place(progress, stages, run)
    names = sorted(e.name for e in session.ema)
    if sorted(progress.ema) != names:
        raise UserError(
            f"{checkpoint}: has the averages {', '.join(sorted(progress.ema))}, the recipe {', '.join(names)} (train.ema)"
        )
    modules = session.modules()
    if progress.stage < len(stages) and progress.step > 0:
        stage = stages[progress.stage]
        loop.make_state(stage)
        modules = session.modules()
        if "state" in modules:
            # Before the turns are listed: a method that finds its state empty would fill it there, for hours.
            load_checkpoint(checkpoint, {"state": modules.pop("state")}, {})
        for turn in {t.updates: t for t in stage.method.turns(session.roles, progress.step)}.values():
            if "+".join(turn.updates) in progress.optim:
                loop.optimizer(turn, stage)
    modules = {k: m for k, m in modules.items() if k not in fresh or f"{k}.safetensors" in held}
    load_checkpoint(checkpoint, modules, {k: o.adam for k, o in loop.optim.items()})
    loop.progress = progress
    loop.meter.restore(progress.meter)
    for key, counts in progress.optim.items():
        if key in loop.optim:
            loop.optim[key].updates, loop.optim[key].skipped = counts["updates"], counts["skipped"]
            loop.optim[key].use_own_options()
    for ema in session.ema:
        ema.updates = progress.ema[ema.name]


def _place(progress: Progress, stages: tuple[Stage, ...], run: Path) -> None:
    """Where a run continues when train.steps has changed since: a finished one goes on in its last stage."""
    last = len(stages) - 1
    before = sum(stage.steps for stage in stages[: progress.stage])
    if progress.done != before + progress.step and progress.done < sum(stage.steps for stage in stages[:last]):
        raise UserError(
            f"{run}: its newest checkpoint stands at stage {progress.stage}, step {progress.step}, which are "
            f"not {progress.done} steps; it belongs to another recipe"
        )
    into = progress.done - sum(stage.steps for stage in stages[:last])
    if into > stages[last].steps:
        raise UserError(
            f"{run}: has already done {into} steps of the last stage; train.steps must be at least that, "
            f"not {stages[last].steps}"
        )
    if into > 0:
        progress.stage, progress.step = (last, into) if into < stages[last].steps else (last + 1, 0)
