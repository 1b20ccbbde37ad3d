"""The run's log: means between two records, one JSON object a line, safe to cut and to continue."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.config import UserError
from fewstep.files import atomic_path, parse_json


class Meter:
    """Means of named scalars since the last record; tensors are read when a record is made, or by `newest`."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor | float]] = defaultdict(list)
        self._seen: dict[str, int] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        self._values[name].append(value.detach() if isinstance(value, Tensor) else value)

    def values(self) -> dict[str, list[float]]:
        """What has been added since the last record, for a checkpoint: a resumed run logs the same means."""
        return {k: [float(v) for v in vs] for k, vs in self._values.items()}

    def restore(self, values: Mapping[str, Sequence[float]]) -> None:
        """The state that `values` has given."""
        self._values.clear()
        for name, vs in values.items():
            self._values[name].extend(vs)
        self._seen = self.mark()

    def newest(self, name: str) -> list[float]:
        """What has been added under a name since it was last asked for so."""
        found = self._values.get(name, [])
        seen, self._seen[name] = self._seen.get(name, 0), len(found)
        return [float(v) for v in found[seen:]]

    def mark(self) -> dict[str, int]:
        """Where it stands, for `back`."""
        return {k: len(vs) for k, vs in self._values.items()}

    def back(self, mark: Mapping[str, int]) -> None:
        """Drop what was added after `mark`."""
        for name in list(self._values):
            del self._values[name][mark.get(name, 0) :]
            if not self._values[name]:
                del self._values[name]

    def means(self) -> dict[str, float]:
        """Means of what has been added since the last record."""
        return {k: sum(float(v) for v in vs) / len(vs) for k, vs in self._values.items()}

    def take(self) -> dict[str, float]:
        """`means`, which a record now holds."""
        out = self.means()
        self._values.clear()
        self._seen.clear()
        return out


class Log:
    """log.jsonl of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps(record) + "\n")

    def cut(self, done: int) -> None:
        """Drop records later than `done` steps, and a last line that a kill left incomplete."""
        if not self.path.exists():
            return
        kept = []
        for line, record in _records(self.path):
            if record.get("done", 0) <= done:
                kept.append(line)
        with atomic_path(self.path) as aside:
            aside.write_text("".join(f"{line}\n" for line in kept))


def read_log(path: Path) -> list[dict[str, Any]]:
    """All complete records of a log.jsonl, none where there is no file yet."""
    return [record for _, record in _records(path)] if path.is_file() else []


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a log that are records; others, which a kill or an editor left, are passed over."""
    for line in path.read_bytes().split(b"\n"):
        try:
            text = line.decode()
            record = parse_json(text, path)
        except (ValueError, UserError):
            continue
        if isinstance(record, dict) and isinstance(record.get("done", 0), int | float):
            yield text, record


def check_trackers(names: Sequence[str]) -> None:
    """UserError when the package of a tracker is not installed: accelerate would leave it out in silence."""
    for name in names:
        spec = find_spec(name)
        # A folder of that name imports too, and wandb leaves one behind where it has run.
        if spec is None or spec.origin is None:
            raise UserError(f"train.trackers: {name} is not installed; pip install {name}, or leave it out")


def start_trackers(accelerator: Any, names: Sequence[str], run: Path, done: int = 0) -> None:
    """Start trackers in a run directory; `accelerator.log` writes to them from now on. UserError when one cannot.

    What an interrupted run told TensorBoard of steps after `done` is taken back: they are made again.
    """
    from accelerate.tracking import filter_trackers

    accelerator.project_configuration.set_directories(str(run))
    accelerator.log_with = filter_trackers(list(names), run)
    try:
        accelerator.init_trackers("fewstep", init_kwargs={"tensorboard": {"purge_step": done + 1}})
    except Exception as error:  # wandb without an account, a proxy in the way: of the tracker's own kinds
        raise UserError(f"train.trackers: {', '.join(names)} cannot start: {error}") from None
