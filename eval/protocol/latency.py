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


@torch.no_grad()
def seconds_per_1000(generate: Callable[[list[int]], Tensor], indices: list[int], best_of: int = 3) -> float:
    """Seconds per 1,000 images: of one more call than `best_of` on `indices`, the first apart, the shortest.

    The first call is cold (memory and kernels are found on it). With CUDA it is wall time between two synchronisations,
    on a CPU processor time on one thread, in which waiting for one's turn does not count (a neighbour on the same core
    does): several threads would count their waiting for each other too.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generate(indices)
        warm = [_seconds(lambda: generate(indices)) for _ in range(best_of)]
    finally:
        torch.set_num_threads(threads)
    return 1000 * min(warm) / len(indices)


def _seconds(call: Callable[[], object]) -> float:
    start = _now()
    call()
    return _now() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
