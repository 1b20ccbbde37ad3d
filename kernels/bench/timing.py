"""Time and peak memory of competing calls, measured so that a ratio means something."""

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def fastest(calls: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Shortest time in seconds of each call over interleaved repeats, after one warm-up each.

    Interleaving gives every call the same share of a noisy host; the minimum is what it can do undisturbed.
    """
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            best[name] = min(best[name], _once(call, device))
    return best


def _once(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3


def peak_extra_bytes(call: Callable[[], object], device: str) -> int:
    """Peak memory of one call beyond what was held before it, its results included.

    On a CPU this is the resident set, so run it in a fresh process; needs Linux.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(match.group(1)) * 1024
