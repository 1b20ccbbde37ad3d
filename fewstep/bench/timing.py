"""Calls timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def in_turn(
    first: Callable[[], object], second: Callable[[], object], rounds: int, repeat: int = 1
) -> list[tuple[float, float]]:
    """Seconds of a call of both, `rounds` times, each going first every other time.

    On a CPU they are this process's own time, which another process's load changes less than the wall's.
    """
    pairs = []
    for i in range(rounds):
        order = (first, second) if i % 2 else (second, first)
        seconds = {f: seconds_of(f, repeat) for f in order}
        pairs.append((seconds[first], seconds[second]))
    return pairs


def seconds_of(call: Callable[[], object], repeat: int = 1) -> float:
    """Seconds of one call, the mean of `repeat`: of this process's own time, with a GPU of the wall, until it is idle."""
    on_cuda = torch.cuda.is_available()
    clock, wait = (time.perf_counter, torch.cuda.synchronize) if on_cuda else (time.process_time, int)
    wait()
    start = clock()
    for _ in range(repeat):
        call()
    wait()
    return (clock() - start) / repeat
