"""Out of memory, in one line: the setting that saves most by `fewstep plan`, and the command that goes on with it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fewstep.commands.plan import MIB, plan
from fewstep.config import UserError
from fewstep.networks.specs import Lora
from fewstep.recipe.schema import Recipe
from fewstep.train.memory import OutOfMemory, is_out_of_memory
from fewstep.train.state import checkpoints

ANEW = "critic={name: lora, of: teacher}"
"""The setting under which no checkpoint fits: other roles have weights."""


def best_way(recipe: Recipe, processes: int = 1) -> tuple[str, int, int] | None:
    """(setting, bytes with it, bytes now) of what saves most by `plan`; None where nothing does.

    Beside `plan`'s own ways: an adapter on the teacher as the critic, where that is a full copy of it.
    """
    now = plan(recipe, processes)
    ways = list(now.ways)
    critic = recipe.critic
    copied = any("critic" in stage.copy for stage in recipe.stages())
    if critic is not None and critic.name == "copy" and getattr(critic, "of", "") == "teacher" and not copied:
        try:
            less = plan(replace(recipe, critic=Lora(of="teacher")), processes, ways=False).total
            ways.append((ANEW, less))
        except (UserError, ValueError):  # a method that trains whole critics alone
            pass
    setting, less = min(ways, key=lambda way: way[1], default=("", now.total))
    return (setting, less, now.total) if less < now.total else None


@contextmanager
def explained(name: str, settings: Sequence[str], recipe: Recipe, run: Path, processes: int = 1) -> Iterator[None]:
    """Turn running out of memory in the block into one UserError that says what to change, and how to go on."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
            raise
        told = str(error) if isinstance(error, OutOfMemory) else "out of memory while the networks were built"
    raise UserError(f"{told}. {_advice(name, settings, recipe, run, processes)}")


def _advice(name: str, settings: Sequence[str], recipe: Recipe, run: Path, processes: int) -> str:
    try:
        found = best_way(recipe, processes)
    except Exception:  # what has no memory left, or cannot be traced, still gets its message
        return "See `fewstep plan` for what saves memory"
    if found is None:
        return "No setting saves memory by `fewstep plan`; give a smaller train.batch or smaller networks"
    setting, less, now = found
    # `plan` writes one line for all roles; a setting names one.
    each = [setting.replace("*", role) for role in recipe.optim] if "*" in setting else [setting]
    again = ["fewstep", "run", name, *settings, *each, "--out", f"{run}-2"]
    if setting != ANEW and checkpoints(run / "checkpoints"):
        again += ["--from", str(run)]
    return f"{setting} saves most, {now / MIB:.0f} -> {less / MIB:.0f} MiB by `fewstep plan`: {shlex.join(again)}"
