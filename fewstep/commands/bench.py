"""`fewstep bench`: a benchmark in a process of its own, which nothing that was imported here can slow or warm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from fewstep.config import UserError, _close

APART = ("timing", "readme", "versions")
"""Modules of the room that measure nothing by themselves."""


def benches() -> list[str]:
    """Names of the benchmarks, from the room's files; none is imported."""
    room = Path(str(files("fewstep"))) / "bench"
    return sorted(p.stem for p in room.glob("[!_]*.py") if p.stem not in APART)


def run_bench(name: str, arguments: Sequence[str]) -> int:
    """Run `python -m fewstep.bench.NAME` with the arguments; its exit code. UserError for another name."""
    if name not in benches():
        raise UserError(f"bench {name!r}: unknown{_close(name, benches())}; there are {', '.join(benches())}")
    return subprocess.run([sys.executable, "-m", f"fewstep.bench.{name}", *arguments], check=False).returncode
