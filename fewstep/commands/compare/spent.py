"""What a run has spent: seconds, network calls, memory; and the file that keeps it beside the checkpoints."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.config import UserError
from fewstep.files import parse_json


@dataclass
class Spent:
    """What a run has spent after `done` steps."""

    done: int = 0
    seconds: float = 0.0
    calls: int = 0
    cpu_seconds: float = 0.0
    """Processor time of all threads: unlike `seconds`, what other programs do on the machine hardly changes it."""
    peak_memory_mib: float = 0.0
    """Of the training alone, measurements aside; on a CPU up to the first of them, see `peak_memory`."""
    resumes: int = 0
    """How often it was interrupted and continued."""

    def plus(self, other: Spent, sign: int = 1) -> Spent:
        """Seconds and calls of both together; all else stays."""
        return replace(
            self,
            seconds=self.seconds + sign * other.seconds,
            calls=self.calls + sign * other.calls,
            cpu_seconds=self.cpu_seconds + sign * other.cpu_seconds,
        )

    def minus(self, other: Spent) -> Spent:
        """What came after another."""
        return self.plus(other, -1)

    def of(self, kind: str) -> float:
        """In the unit of a budget of seconds or calls."""
        return self.seconds if kind == "seconds" else float(self.calls)


def peak_memory() -> float:
    """MiB: of the device, on a CPU the largest resident size of this process, which is never taken back."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def account_of(run: Path) -> list[Spent]:
    """The whole lines of RUN/account.jsonl, one a checkpoint; none where there is no file."""
    path = run / "account.jsonl"
    entries = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entries.append(spent_of(parse_json(line, path)))
        except (UserError, TypeError, ValueError):
            continue  # a line that a kill left incomplete
    return entries


def spent_of(held: Any) -> Spent:
    """From what `vars` gave; ValueError for anything else."""
    if not isinstance(held, dict) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in held.values()):
        raise ValueError("expected numbers")
    return Spent(**held)
