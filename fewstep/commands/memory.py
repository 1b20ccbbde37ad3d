"""Out of memory, in one line: the setting that saves most by `fewstep plan`, and the command that goes on with it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

from fewstep.commands.plan import MIB, plan
from fewstep.config import UserError
from fewstep.networks import code
from fewstep.networks.specs import Lora
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load, load_run
from fewstep.train.memory import OutOfMemory, is_out_of_memory
from fewstep.train.resume import newest_of, refuses
from fewstep.train.state import checkpoints

ANEW = "critic={name: lora, of: teacher}"
"""A setting beside those of `plan`."""


def ways(recipe: Recipe, processes: int = 1) -> tuple[int, list[tuple[str, int]]]:
    """(bytes now, (setting, bytes with it) of what saves by `plan`, the most first).

    Beside `plan`'s own ways: an adapter on the teacher as the critic, where that is a full copy of it.
    """
    now = plan(recipe, processes)
    found = list(now.ways)
    critic = recipe.critic
    copied = any("critic" in stage.copy for stage in recipe.stages())
    if critic is not None and critic.name == "copy" and getattr(critic, "of", "") == "teacher" and not copied:
        try:
            less = plan(replace(recipe, critic=Lora(of="teacher")), processes, ways=False).total
            found.append((ANEW, less))
        except (UserError, ValueError):  # a method that trains whole critics alone
            pass
    return now.total, sorted([way for way in found if way[1] < now.total], key=lambda way: way[1])


@contextmanager
def explained(
    name: str, settings: Sequence[str], recipe: Recipe, run: Path, processes: int = 1, start: Path | None = None
) -> Iterator[None]:
    """Turn running out of memory in the block into one UserError that says what to change, and how to go on."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
            raise
        told = str(error) if isinstance(error, OutOfMemory) else "out of memory while the networks were built"
    raise UserError(f"{told}. {_advice(name, settings, recipe, run, processes, start)}")


def _advice(
    name: str, settings: Sequence[str], recipe: Recipe, run: Path, processes: int, start: Path | None = None
) -> str:
    try:
        now, found = ways(recipe, processes)
    except Exception:  # what has no memory left, or cannot be traced, still gets its message
        return "See `fewstep plan` for what saves memory"
    if not found:
        return "No setting saves memory by `fewstep plan`; give a smaller train.batch or smaller networks"
    begin = run if checkpoints(run / "checkpoints") else start
    other = load_run(newest_of(begin).parent.parent) if begin is not None else None
    accepted = [
        way for way in found if other is None or not refuses(load(name, [*settings, *_each(way[0], recipe)]), other)
    ]
    # Where each of them makes another run of it, it begins anew.
    setting, less = (accepted or found)[0]
    again = ["fewstep", "run", name, *settings, *_each(setting, recipe), "--out", str(_free(run))]
    again += [*code.words(recipe), *(["--from", str(begin)] if begin is not None and accepted else [])]
    return f"{setting} saves most, {now / MIB:.0f} -> {less / MIB:.0f} MiB by `fewstep plan`: {shlex.join(again)}"


def _each(setting: str, recipe: Recipe) -> list[str]:
    """`plan` writes one line for all roles; a setting names one."""
    return [setting.replace("*", role) for role in recipe.optim] if "*" in setting else [setting]


def _free(run: Path) -> Path:
    """A run directory beside this one that is not there yet."""
    return next(path for n in count(2) if not (path := run.with_name(f"{run.name}-{n}")).exists())
