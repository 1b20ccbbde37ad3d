"""The processes of one launch, for commands that share their work out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fewstep.train.launch import launched


@dataclass(frozen=True)
class World:
    """This process among those that were launched together."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


@contextmanager
def world() -> Iterator[tuple[World, Callable[[], None]]]:
    """The processes started by accelerate or torch.distributed.run, and a barrier; closed at the end."""
    from accelerate import PartialState

    launched()
    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        yield World(state.process_index, state.num_processes, state.device), state.wait_for_everyone
    finally:
        if state.num_processes > 1:
            torch.distributed.destroy_process_group()
