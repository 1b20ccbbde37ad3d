"""One go on a GPU: each part within its limit, what fails has a row, what there is stays."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from fewstep.bench import gpu
from fewstep.bench.gpu import LIMITS, Row, main, parts, run, write


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_fails_and_one_that_takes_too_long_have_rows(tmp_path: Path):
    failed, _ = run("kernels", python("print('no such kernel'); raise SystemExit(3)"), 30, tmp_path)
    assert (failed.what, failed.value) == ("failed with exit code 3", "no such kernel")
    (slow,) = run("tests", python("import time; print('begun', flush=True); time.sleep(60)"), 1, tmp_path)
    assert (slow.what, slow.value, slow.unit) == ("ended at its limit", "1", "s")
    assert (tmp_path / "tests.log").read_text() == "begun\n"
    none, _ = run("tests", python("print('5 deselected'); raise SystemExit(5)"), 30, tmp_path)
    assert none.value == "5 deselected"  # no test is for this machine: nothing failed


def test_rows_of_a_part_are_read_from_its_last_line(tmp_path: Path):
    row = '[{"part": "sdxl", "what": "a step", "value": "1.5", "unit": "s", "estimate": ""}]'
    assert run("sdxl", python(f"print('a warning'); print({row!r})"), 30, tmp_path)[0] == Row(
        "sdxl", "a step", "1.5", "s"
    )


def test_the_last_part_has_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = iter((100.0, 100.0 + 200))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    found = list(parts(tmp_path, Path("mnist"), False, 540))
    assert [name for name, _, _ in found] == [*LIMITS, "student"]
    assert sum(LIMITS.values()) + 60 < 540  # the student's minute at least, whatever the others take
    _, command, limit = found[-1]
    assert limit == 340
    assert f"seconds={340 - gpu.SPARE:.0f}" in command
    assert "data.path=mnist" in command


def test_both_files_hold_all_rows(tmp_path: Path):
    rows = [Row("sdxl", "a step", "1.5", "s"), Row("tests", "said", "1 | 2")]
    write(rows, tmp_path)
    with (tmp_path / "gpu.csv").open(newline="") as file:
        assert [row["value"] for row in csv.DictReader(file)] == ["1.5", "1 | 2"]
    assert r"| tests | said | 1 \| 2 |  |  |" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_it_says_what_can_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device is here; --rehearse"):
        main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
