"""Rows of the one benchmark CSV: what was measured, against what, on what."""

import csv
import datetime
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from fewstep.files import atomic_path, commit

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.csv"
UNMEASURED = "unmeasured"


@dataclass(frozen=True)
class Row:
    """One figure. value is a number as text, or "unmeasured"; at_least and aim are the goals of the issue."""

    op: str
    case: str
    metric: str
    value: str
    at_least: str = ""
    detail: str = ""
    hardware: str = ""
    driver: str = ""
    threads: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""


def _command(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, cwd=FOLDER, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: str) -> dict[str, str]:
    """The columns that say where a row comes from."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "absent"
    gpu = device == "cuda" and torch.cuda.is_available()
    driver = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else ""
    return {
        "hardware": torch.cuda.get_device_name() if gpu else _processor(),
        "driver": driver,
        "threads": "" if gpu else str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": version,
        "commit": commit()[:7],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def read(path: Path = RESULTS) -> list[Row]:
    """All rows of the CSV; an absent file has none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def write(rows: list[Row], path: Path = RESULTS) -> None:
    """Puts rows into the CSV in place of older ones of the same op, case and metric.

    An unmeasured row never replaces a measured one.
    """
    merged = {(r.op, r.case, r.metric): r for r in read(path)}
    for row in rows:
        key = (row.op, row.case, row.metric)
        if row.value == UNMEASURED and key in merged and merged[key].value != UNMEASURED:
            continue
        merged[key] = row
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(r) for r in merged.values())
