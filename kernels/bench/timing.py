"""Time and peak memory of competing calls, measured so that a ratio means something."""

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Calls = Mapping[str, Callable[[], object]]


class BusyHost(RuntimeError):
    """Wall times mean nothing: other processes held the processors."""


def _shortest(calls: Calls, repeats: int, once: Callable[[Callable[[], object]], float]) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            best[name] = min(best[name], once(call))
    return best


def fastest(calls: Calls, repeats: int, device: str) -> dict[str, float]:
    """Shortest wall time in seconds of each call over interleaved repeats, after one warm-up each.

    Interleaving gives every call the same share of a noisy host; the minimum is what it can do undisturbed.
    Raises BusyHost when the process did not get at least 0.8 of the processor time its threads could use.
    """
    if device != "cpu":
        return _shortest(calls, repeats, lambda call: _once(call, device))
    threads = torch.get_num_threads()
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load > 1.5 * processors:
        raise BusyHost(f"load {load:.1f} on {processors} processors; repeat on a quiet host")
    wall, used = time.perf_counter(), time.process_time()
    best = _shortest(calls, repeats, lambda call: _once(call, device))
    share = (time.process_time() - used) / (time.perf_counter() - wall) / threads
    if share < 0.8:
        raise BusyHost(
            f"got {share:.0%} of {threads} threads (load {load:.1f} on {processors} processors); repeat on a quiet host"
        )
    return best


def least_cpu_seconds(calls: Calls, repeats: int) -> dict[str, float]:
    """Smallest processor time in seconds of each call on one thread: a busy host hardly changes it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _shortest(calls, repeats, _processor_seconds)
    finally:
        torch.set_num_threads(threads)


def _processor_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


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
