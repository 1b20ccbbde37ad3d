"""What belongs on which leaderboard: its metric, its recipes, and the groups that they are ranked in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from fewstep.commands.compare.one_run import NEVER, identity
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load

GROUPS = ("the teacher alone", "the teacher and data", "data; the teacher at most as a start")


@dataclass(frozen=True)
class Board:
    """Whose recipes it ranks, and by what."""

    prefix: str
    metric: str
    """That of the recipes that belong on it."""
    preset: str
    """That of its rows, with more samples."""
    samples: int


BOARDS = {
    "digits": Board("digits-", "fd-house-digits", "digits", 5000),
    "fashion": Board("fashion-", "fd-house-fashion-mnist", "fashion-mnist", 10000),
    "toy": Board("toy/", "energy", "energy", 4000),
}


def group_of(recipe: Recipe) -> str:
    """What the stages that distil need, as rows are grouped; a stage that trains a teacher's own loss is none of them.

    >>> fewstep.bench.boards.group_of(fewstep.load("digits-kd"))
    'the teacher alone'
    """
    methods = [m for stage in recipe.stages() if (m := stage.method).name != "denoise"] or [recipe.method]
    needs = [m.needs() for m in methods]
    asked = set().union(*(n.roles & n.frozen for n in needs)) - {"target", "stage1"}  # copies of the student
    if not asked and getattr(recipe.discriminator, "trunk", "") != "teacher":
        return GROUPS[2]
    return GROUPS[1] if any(n.data for n in needs) else GROUPS[0]


@cache
def ranked(board: Board) -> tuple[str, ...]:
    """Shipped recipes that have a row, or could have one: students without a reward, by its metric."""
    found = []
    for name in shipped():
        if name.startswith(board.prefix):
            recipe = load(name)
            alike = recipe.evaluate is not None and recipe.evaluate.metric == board.metric
            if alike and recipe.teacher is not None and "reward" not in recipe.roles:
                found.append(name)
    return tuple(found)


def is_guided(recipe: Recipe) -> bool:
    """Whether it aims at a guided distribution, whose distance to the data is no verdict."""
    return getattr(recipe.method, "guidance", 1.0) not in (1.0, (1.0, 1.0))


def settings_of(board: Board) -> list[str]:
    """Changes to the recipes with which a board's rows are measured."""
    return [] if board.metric == board.preset else [f"evaluate.metric={board.preset}"]


@cache
def digest_of(name: str) -> str:
    """What `fewstep compare` keeps of the recipe that a run had, of one as it ships today."""
    return identity(load(name, list(NEVER)))
