"""How fast samples come: warm calls only, synchronised; a speed, percentiles over repeated calls, peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Latency:
    """Seconds per call of `batch_size` images; `peak_bytes` is device memory, None on the CPU."""

    batch_size: int
    p50: float
    p95: float
    images_per_second: float
    repeats: int
    peak_bytes: int | None


def measure_latency(
    generate: Callable[[list[int]], Tensor], batch_size: int = 1, repeats: int = 20, warm_up: int = 3
) -> Latency:
    """Time `generate` on consecutive indices.

    Raises:
        ValueError: counts below 1.
    """
    if min(batch_size, repeats) < 1 or warm_up < 0:
        raise ValueError(f"batch_size, repeats, warm_up: got {batch_size}, {repeats}, {warm_up}")
    device = torch.cuda.is_available()
    times = []
    for turn in range(warm_up + repeats):
        if turn == warm_up and device:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        generate(list(range(turn * batch_size, (turn + 1) * batch_size)))
        if device:
            torch.cuda.synchronize()
        if turn >= warm_up:
            times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device else None
    p50, p95 = np.percentile(times, [50, 95])
    return Latency(batch_size, float(p50), float(p95), batch_size / float(np.mean(times)), repeats, peak)


class Clock:
    """A generator that tells its own speed: ``generate`` with a watch on it, from warm calls alone.

    The first call is cold (memory, kernels, threads are found on it) and never counts; of the others only those of as
    many images as the first one count, and of these the best does. On a CPU it is processor time over all threads, which
    a busy machine does not lengthen, with CUDA wall time between two synchronisations.
    """

    def __init__(self, generate: Callable[[list[int]], Tensor], best_of: int = 3) -> None:
        self.generate, self.best_of = generate, best_of
        self.first: list[int] | None = None
        self.warm: list[float] = []

    def __call__(self, indices: list[int]) -> Tensor:
        start = _now()
        images = self.generate(indices)
        seconds = _now() - start
        if self.first is None:
            self.first = list(indices)
        elif len(indices) == len(self.first):
            self.warm.append(seconds)
        return images

    @torch.no_grad()
    def per_1000(self, indices: list[int]) -> float:
        """Seconds per 1,000 images; where there were too few warm calls for a best of n, further ones are made.

        `indices` are for a generator that was not called yet, such as when all its samples lay on the disk.
        """
        while self.first is None or len(self.warm) < self.best_of:
            self(indices if self.first is None else self.first)
        return 1000 * min(self.warm) / len(self.first)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
