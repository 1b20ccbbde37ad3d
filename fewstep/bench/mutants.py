"""What the suite sees of edits made by rules: `python -m fewstep.bench.mutants [--rooms ROOM ...]`.

One-line edits (see `edits`) are drawn with a fixed seed, each is made in a temporary copy of the checkout, never in the
checkout, and the tests of its room run there until one fails. A survivor is a line that no test holds, or an edit that
changes nothing (a bound that is never met, say). An interrupted call goes on from its JSON file; a room whose sources or
tests have changed since begins anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep.bench.edits import Edit, draw
from fewstep.config import UserError
from fewstep.files import atomic_path, read_json

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("algebra", "objectives", "methods", "recipe", "train", "export", "eval", "kernels")
BESIDE = ("eval", "kernels")
"""Rooms that lie beside fewstep/ in the checkout and inside it once installed."""
MAPPED = (*BESIDE, "recipes", "assets")
LAWFUL = ("objectives", "methods")
"""Rooms whose tests are in tests/laws too."""
LEFT = (".git", ".venv", ".typing", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "runs")
"""What the copy goes without."""
Result = Literal["killed", "timeout", "survived"]
Run = Callable[[Path, list[str], float], tuple[int, str]]
"""(copy, test files, seconds) -> (exit code of pytest, -1 when time was up, what it printed)."""


@dataclass(frozen=True)
class Tried:
    """One edit and what the tests of its room said."""

    room: str
    edit: Edit
    result: Result
    by: str
    """The first test that failed; "" where none did."""
    seconds: float


def sources(root: Path, room: str) -> list[tuple[str, Path]]:
    """(name from the root, path) of a room's modules."""
    folder = root / room if room in BESIDE else root / "fewstep" / room
    found = [p for p in sorted(folder.rglob("*.py")) if p.name != "__init__.py" and "bench" not in p.parts]
    if not found:
        raise UserError(f"{folder}: has no modules; run this from a checkout")
    return [(p.relative_to(root).as_posix(), p) for p in found]


def suite_of(root: Path, room: str, file: str = "") -> list[str]:
    """The room's test files; that of the edited file comes first, as the likeliest to fail."""
    folders = [room, *(["laws"] if room in LAWFUL else [])]
    found = [p.relative_to(root).as_posix() for f in folders for p in sorted((root / "tests" / f).glob("test_*.py"))]
    mirror = f"tests/{room}/test_{Path(file).stem}.py"
    return sorted(found, key=lambda name: name != mirror)


def state_of(root: Path, room: str) -> str:
    """A digest of a room's sources and tests."""
    digest = hashlib.sha256()
    for name in [*(n for n, _ in sources(root, room)), *sorted(suite_of(root, room))]:
        digest.update(f"{name}\n".encode() + (root / name).read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A temporary copy of the checkout that Python takes `fewstep` from; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fewstep-mutants-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*LEFT), symlinks=True)
        for name in MAPPED:
            if (copy / name).is_dir():
                (copy / "fewstep" / name).symlink_to(copy / name)
        yield copy


def environment(copy: Path) -> dict[str, str]:
    """One thread, `fewstep` from the copy, and no bytecode: it is told apart by seconds and size, as edits are not."""
    one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONDONTWRITEBYTECODE")}
    return {**os.environ, **one, "PYTHONPATH": str(copy)}


def check_copy(copy: Path, room: str) -> None:
    """RuntimeError where Python would test another tree than the copy."""
    code = f"from importlib.util import find_spec as f; print(f('fewstep.{room}').submodule_search_locations[0])"
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True, check=True)
    place = Path(told.stdout.strip()).resolve()
    if not place.is_relative_to(copy.resolve()):
        raise RuntimeError(f"fewstep.{room} is taken from {place}, not from the copy {copy}")


def pytest_in(copy: Path, files: list[str], seconds: float) -> tuple[int, str]:
    """Run test files in the copy up to the first failure; with all that they started they end when time is up."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *files]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=copy, env=environment(copy), start_new_session=True, **pipes) as process:
        try:
            said = process.communicate(timeout=seconds)[0]
            return process.returncode, said
        except subprocess.TimeoutExpired:
            return -1, ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def attempt(copy: Path, room: str, edit: Edit, seconds: float, run: Run) -> Tried:
    """Make one edit in the copy, run the room's tests, take it back. RuntimeError when pytest itself fails."""
    place, started = copy / edit.file, time.perf_counter()
    text = place.read_text(encoding="utf-8")
    place.write_text(edit.apply(text), encoding="utf-8")
    try:
        code, said = run(copy, suite_of(copy, room, edit.file), seconds)
    finally:
        place.write_text(text, encoding="utf-8")
    # 1: a test failed; 2: a file could not be collected, which stops the run.
    results: dict[int, Result] = {0: "survived", 1: "killed", 2: "killed", -1: "timeout"}
    if code not in results:
        raise RuntimeError(f"pytest ended with {code} on {edit.file}:{edit.line}:\n{said[-2000:]}")
    by = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    return Tried(room, edit, results[code], by[1] if by else "", round(time.perf_counter() - started, 1))


def read(out: Path, seed: int) -> dict[str, Any]:
    """What an earlier call with this seed left; empty without one. UserError for a file of something else."""
    if not out.exists():
        return {"seed": seed, "rooms": {}}
    try:
        held = read_json(out)
        other = held["seed"]
        held["rooms"].items()
    except (UserError, KeyError, TypeError, AttributeError):
        raise UserError(f"{out}: is not a record of mutants; choose another file with --out") from None
    if other != seed:
        raise UserError(f"{out}: was drawn with --seed {other}, not {seed}; choose another file with --out")
    return held


def measure(
    rooms: Sequence[str],
    count: int,
    seed: int,
    out: Path,
    timeout: float = 0.0,
    *,
    root: Path = ROOT,
    run: Run = pytest_in,
) -> list[Tried]:
    """Try `count` edits of each room, writing `out` after every one; what it holds of them already is not run again.

    timeout: seconds for one edit; 0 gives three times what the room's tests take unedited, and a minute. UserError when
    they fail unedited: every edit would seem to be seen.
    """
    held, tried = read(out, seed), []
    with copied(root) as copy:
        for room in rooms:
            edits = draw(sources(root, room), count, seed, room)
            state = state_of(root, room)
            place = held["rooms"].get(room)
            if place is None or place["state"] != state:
                place = held["rooms"][room] = {"state": state, "unedited": None, "tried": []}
            before = {Edit(**t["edit"]): Tried(**{**t, "edit": Edit(**t["edit"])}) for t in place["tried"]}
            if any(edit not in before for edit in edits):
                if run is pytest_in:
                    check_copy(copy, room)
                if place["unedited"] is None:
                    place["unedited"] = _unedited(copy, room, run)
            for edit in edits:
                if edit not in before:
                    before[edit] = attempt(copy, room, edit, timeout or 60 + 3 * place["unedited"], run)
                    place["tried"].append(asdict(before[edit]))
                    with atomic_path(out) as temporary:
                        temporary.write_text(json.dumps(held, indent=1), encoding="utf-8")
                    print(f"{before[edit].result:9}{edit.file}:{edit.line} {edit.rule}", file=sys.stderr, flush=True)
                tried.append(before[edit])
    return tried


def _unedited(copy: Path, room: str, run: Run) -> float:
    started = time.perf_counter()
    code, said = run(copy, suite_of(copy, room), 24 * 3600.0)
    if code != 0:
        raise UserError(f"the tests of {room} fail without an edit:\n{said[-1500:]}")
    return round(time.perf_counter() - started, 1)


def table(tried: Sequence[Tried]) -> str:
    """A row a room, then every survivor with its line before and after."""
    lines = [f"{'room':12}{'edits':>7}{'killed':>8}{'timeout':>9}{'survived':>10}{'seen':>7}"]
    rooms = list(dict.fromkeys(t.room for t in tried))
    for room in [*rooms, "all"]:
        mine = [t.result for t in tried if room in (t.room, "all")]
        counts = [mine.count(result) for result in ("killed", "timeout", "survived")]
        seen = f"{(len(mine) - counts[2]) / max(1, len(mine)):.0%}"
        lines.append(f"{room:12}{len(mine):>7}{counts[0]:>8}{counts[1]:>9}{counts[2]:>10}{seen:>7}")
    for t in tried:
        if t.result == "survived":
            e = t.edit
            lines.append(f"\n{e.file}:{e.line} ({e.rule})\n  - {e.before.strip()}\n  + {e.after.strip()}")
    return "\n".join(lines)


def main(argv: Sequence[str] = ()) -> None:
    """Print the table and write the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.bench.mutants", description=__doc__)
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=ROOMS, metavar="ROOM", help=", ".join(ROOMS))
    parser.add_argument("--count", type=int, default=20, help="edits a room")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--timeout", type=float, default=0.0, help="seconds for one edit; by the room's own time if 0")
    parser.add_argument("--out", type=Path, default=Path("mutants.json"), help="goes on from what it holds")
    given = parser.parse_args(argv)
    if given.count < 1 or given.timeout < 0:
        parser.error("--count must be at least 1, and --timeout at least 0")
    # A SIGTERM too takes the copy and the tests that run in it along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        print(table(measure(given.rooms, given.count, given.seed, given.out, given.timeout)))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
