"""What a launcher told this process of its group, checked before accelerate and torch read it."""

from __future__ import annotations

import os

from fewstep.config import UserError

SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Of the group, as torch's and accelerate's launchers and those of MPI name it; from 1."""
RANKS = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Of a process in its group; from 0, and -1 is none."""


def launched() -> int:
    """Processes that a launcher started, 1 without one. UserError naming a variable that no launcher sets so."""
    least = dict.fromkeys(SIZES, 1) | dict.fromkeys(RANKS, -1)
    found = {name: _number(name, low) for name, low in least.items() if name in os.environ}
    world = found.get("WORLD_SIZE", 1)
    if world > 1:
        _number("MASTER_PORT", 0)
        if found.get("RANK", 0) >= world:
            raise UserError(f"RANK is {found['RANK']}, but WORLD_SIZE is {world}, so ranks are 0 to {world - 1}")
    return world


def _number(name: str, low: int) -> int:
    text = os.environ.get(name, str(low))
    try:
        number = int(text)
    except ValueError:
        number = low - 1
    if not low <= number < 1 << 16:
        raise UserError(
            f"{name} is {text[:40]!r} in the environment, where launchers put a whole number from {max(low, 0)}; unset "
            "it, or launch with `python -m torch.distributed.run` or `accelerate launch`"
        )
    return number
