"""`fewstep probe`: which runs of a network's blocks one block could do, before anything is trained (PPCL)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.noising import add_noise
from fewstep.commands.report import console, say
from fewstep.config import UserError
from fewstep.networks.blocks import blocks_of
from fewstep.networks.probing import Probe, cheapest, proposed
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load
from fewstep.train.product import open_product, teacher_beside

MOST = 100_000


@dataclass(frozen=True)
class Probed:
    """residuals: of every block. intervals: the runs that are proposed; losses: 1 - CKA of each."""

    residuals: list[float]
    intervals: list[tuple[int, int]]
    losses: list[float]


def probe(name: str, *, samples: int = 256, remove: int | None = None, accept: float = 0.05, seed: int = 0) -> Probed:
    """Probe the teacher of a recipe, or what a run trained, on the recipe's own data at levels u in [0, 1].

    Raises:
        UserError: there is no network of blocks, no data, or `remove` blocks cannot be taken away.
    """
    if not 2 <= samples <= MOST:
        raise UserError(f"--samples {samples}: expected 2 to {MOST}")
    if not 0 <= accept <= 1:
        raise UserError(f"--accept {accept:g}: expected a loss in [0, 1]")
    recipe, net = _network(name)
    data: Any = recipe.data.open()
    try:
        count = len(blocks_of(net))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    if remove is not None and not 1 <= remove < count:
        raise UserError(f"--remove {remove}: there are {count} blocks; give 1 to {count - 1}")
    draws = Draws(fold("probe", seed), torch.arange(samples))
    x0, cond = data.batch(draws)
    t = net.process.grid(torch.linspace(0.02, 0.98, samples, dtype=torch.float64))
    x_t, _ = add_noise(net.process, x0, draws.normal_like(x0), t)
    try:
        found = Probe(net, lambda: net(x_t, t, cond))
    except ValueError as error:
        raise UserError(f"{name}: --samples {samples}: {error}") from None
    try:
        runs = (
            proposed(count, found.loss, found.allowed, accept)
            if remove is None
            else cheapest(count, found.loss, found.allowed, remove)
        )
    except ValueError as error:
        raise UserError(f"--remove {remove}: {error}") from None
    return Probed(found.residuals, runs, [found.loss(u, v - u + 1) for u, v in runs])


def _network(name: str) -> tuple[Recipe, Any]:
    if (Path(name) / "recipe.yaml").is_file():
        product = open_product(Path(name))
        assert product.recipe is not None
        return product.recipe, product.net.eval()
    recipe = load(name)
    if recipe.teacher is None:
        raise UserError(f"{name}: has no teacher; name a run that trained one, or a recipe with a teacher")
    return recipe, teacher_beside(recipe, recipe.data.open(), name)


def show(name: str, told: Probed) -> None:
    """The table of blocks, and the intervals as `student.intervals` takes them."""
    table = Table("block", "residual that no affine map explains, on other samples")
    inside = {i for u, v in told.intervals for i in range(u, v + 1)}
    for i, residual in enumerate(told.residuals):
        table.add_row(f"{i}{' *' if i in inside else ''}", f"{residual:.3f}")
    console.print(table)
    if not told.intervals:
        say("no run of blocks is proposed; raise --accept, or ask for blocks to go with --remove")
        return
    for (u, v), loss in zip(told.intervals, told.losses, strict=True):
        say(f"blocks {u} to {v} by one: the last hidden state loses {loss:.4f} of its alignment (CKA) with stand-ins")
    gone = sum(v - u for u, v in told.intervals)
    count, found = len(told.residuals), list(map(list, told.intervals))
    say(f"{count} blocks become {count - gone}: student.intervals={found}")
