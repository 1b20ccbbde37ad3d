"""`fewstep plan`: the estimate of a recipe's memory as a table, and what can be told without its code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.commands.plan import MIB, Plan, plan
from fewstep.commands.plan_configs import Sizes
from fewstep.commands.plan_rows import RoleMemory, without_code
from fewstep.config import UserError
from fewstep.networks import code
from fewstep.recipe.pinned import fetched
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load


def report(
    name: str,
    settings: Sequence[str] = (),
    processes: int = 1,
    measure: bool = False,
    sizes: Sizes | None = None,
    download: bool = False,
) -> Plan | None:
    """`fewstep plan`: print the estimate of a recipe; with `measure` also what two real steps took.

    sizes: from configs alone, see `plan`. download: fetch what the recipe names of the hub, with `sizes` configs alone.

    None, with what can be told without it, for a recipe that names code: that is not run here.
    """
    from rich.console import Console

    if measure and processes > 1:
        raise UserError("plan: --measure takes its steps in one process; leave --processes out")
    if measure and sizes is not None:
        raise UserError("plan: --measure takes real steps, for which there are no weights; leave --weights none out")
    recipe = load(name, settings)
    if download:
        fetched(recipe, configs=sizes is not None)
    console = Console()
    if not all(map(code.is_allowed, code.named(recipe).values())):
        _report_known(console, name, recipe, measure)
        return None
    found = plan(recipe, processes, sizes=sizes)
    each = f", each of {processes} processes" if processes > 1 else ""
    title = f"{name}: memory in MiB at {found.micro_batch} samples a micro-batch{each}"
    peaks = {updates[0]: 0 for updates in found.activations}
    for updates, peak in found.activations.items():
        peaks[updates[0]] = max(peaks[updates[0]], peak)
    console.print(_table(title, found.roles, peaks))
    console.print(f"worst moment: {found.total / MIB:.1f} MiB of tensors; the libraries' workspaces come on top")
    if sizes is not None:
        console.print("from configs alone: an estimate, no weights, latents or texts were read", highlight=False)
        console.print(found.configs, soft_wrap=True, highlight=False, markup=False)
    if found.note:
        console.print(found.note, soft_wrap=True, highlight=False, markup=False)
    if found.export:
        console.print(f"note: this run {found.export}", soft_wrap=True, highlight=False, markup=False)
    for setting, less in found.ways:
        console.print(f"  {setting:28s} {less / MIB:.1f} MiB ({100 * (less / found.total - 1):+.0f} %)", highlight=False)
    if measure:
        took = _measured_apart(name, settings)
        off = 100 * (found.total / took - 1)
        console.print(f"measured here: {took / MIB:.1f} MiB; the estimate is {off:+.1f} % off", highlight=False)
    return found


def _table(title: str, roles: Mapping[str, RoleMemory], activations: Mapping[str, int] | None) -> Any:
    from rich.table import Table

    out = Table(title=title)
    last = ("activations",) if activations is not None else ()
    for column in ("", "weights", "gradients", "optimiser", "averages", *last):
        out.add_column(column, justify="left" if not column else "right")
    for role, r in roles.items():
        numbers = [r.weights, r.gradients, r.optimizer, r.ema]
        numbers += [activations.get(role, 0)] if activations is not None else []
        out.add_row(role, *(f"{v / MIB:.1f}" if v else "" for v in numbers))
    return out


def _report_known(console: Any, name: str, recipe: Recipe, measure: bool) -> None:
    """The rows that need none of the code which a recipe names, and what was not planned for it."""
    roles, missing = without_code(recipe)
    if roles:
        console.print(_table(f"{name}: memory in MiB, without activations", roles, None))
    named = ", ".join(f"{key} {value}" for key, value in code.named(recipe).items())
    lines = [f"plan runs no code that a recipe names ({named})", f"not planned: {', '.join(missing)}, the worst moment"]
    lines += ["not measured: --measure would run it"] if measure else []
    lines += ["`fewstep run` runs it, and says what to change where memory runs out"]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _measured_apart(name: str, settings: Sequence[str]) -> int:
    """`measured` in a process of its own, which has not traced anything before."""
    command = [sys.executable, "-m", "fewstep.commands.plan", name, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"plan: the measured step failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.splitlines()[-1])
