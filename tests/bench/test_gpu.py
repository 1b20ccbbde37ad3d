"""One go on a GPU: each part within its limit and none beyond it, what fails has a row, what there is stays."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewstep.bench import gpu, switches
from fewstep.bench.gpu import OWN, SHARES, SPARE, TRAINING, Row, main, parts, run, write
from fewstep.kernels.bench import attention, record

STARTS_ANOTHER = ["sh", "-c", 'sleep 300 & echo $! > "$0"; echo begun; wait']


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def ended(pid: int) -> bool:
    """Whether a process is gone within ten seconds; one that nobody waits for counts."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def figures(rows: list[Row]) -> dict[str, tuple[str, str]]:
    return {row.what: (row.value, row.unit) for row in rows}


def test_a_part_that_fails_and_one_that_takes_too_long_have_rows(tmp_path: Path):
    failed, _ = run("kernels", python("print('no such kernel'); raise SystemExit(3)"), 30, tmp_path)
    assert (failed.what, failed.value) == ("failed with exit code 3", "no such kernel")
    slow, said = run("tests", python("import time; print('begun'); time.sleep(60)"), 1, tmp_path)
    assert (slow.what, slow.value, slow.unit) == ("ended at its limit", "1", "s")
    assert said.value == "begun"
    none, _ = run("tests", python("print('5 deselected'); raise SystemExit(5)"), 30, tmp_path)
    assert none.value == "5 deselected"  # no test is for this machine: nothing failed


def test_what_a_part_has_started_ends_with_it(tmp_path: Path):
    file = tmp_path / "pid"
    run("tests", [*STARTS_ANOTHER, str(file)], 0.5, tmp_path)
    assert ended(int(file.read_text()))
    file.unlink()
    run("tests", ["sh", "-c", 'sleep 300 & echo $! > "$0"', str(file)], 30, tmp_path)
    assert ended(int(file.read_text()))  # one that its parent left behind too


def test_an_interrupt_ends_what_a_part_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "pid"

    class Interrupted(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            while "begun" not in (tmp_path / "sdxl.log").read_text():
                time.sleep(0.02)
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("sdxl", [*STARTS_ANOTHER, str(file)], 30, tmp_path)
    assert ended(int(file.read_text()))


def test_rows_of_a_part_stay_whatever_it_says_and_however_it_ends(tmp_path: Path):
    row = Row("sdxl", "a step", "1.5", "s")
    (tmp_path / "sdxl.jsonl").write_text(json.dumps(vars(row)) + '\n{"part": "sd')
    found = run("sdxl", ["sh", "-c", "echo a warning >&2"], 30, tmp_path)
    assert [r.what for r in found] == ["a step", "took"]
    found = run("sdxl", ["sh", "-c", "echo out of memory; exit 1"], 30, tmp_path)
    assert found[:2] == [row, Row("sdxl", "failed with exit code 1", "out of memory")]
    assert run("sdxl", ["sleep", "60"], 0.2, tmp_path)[0] == row
    (tmp_path / "sdxl.jsonl").write_text('{"neither": "part nor what"}\n')
    assert run("sdxl", ["true"], 30, tmp_path)[0].what == "left what cannot be read"


def test_a_part_writes_each_row_as_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def found(rehearse: bool):
        yield Row("switches", "first", "1")
        raise RuntimeError("the second fails")

    monkeypatch.setattr(gpu, "switches", found)
    with pytest.raises(RuntimeError):
        main(["--part", "switches", "--out", str(tmp_path)])
    assert [row.what for row in gpu.known("switches", tmp_path)] == ["first"]


def test_ratios_are_of_the_plain_recipe_or_none(monkeypatch: pytest.MonkeyPatch):
    told = {"": {"peak": 100.0, "seconds": 2.0}, "train.precision=bf16": {"peak": 60.0, "seconds": 1.0}}
    monkeypatch.setattr(switches, "apart", lambda recipe, settings: told.get(" ".join(settings[1:]), "no compiler"))
    found = list(gpu.switches(False))
    assert figures(found)["train.precision=bf16: peak"] == ("0.60", "of digits-dmd2 as it is")
    assert figures(found[:2]) == {
        "digits-dmd2 as it is: peak": ("100.0", "MiB"),
        "digits-dmd2 as it is: step": ("2.0000", "s"),
    }
    assert found[-1].value == "no compiler"
    told[""] = "out of memory"  # type: ignore[assignment]
    found = list(gpu.switches(False))
    assert figures(found)["train.precision=bf16: peak"] == ("60.0", "MiB")
    assert {row.unit for row in found} == {"", "MiB", "s"}


def test_a_setting_that_says_no_figures_is_told(monkeypatch: pytest.MonkeyPatch):
    done = subprocess.CompletedProcess([], 0, stdout="{}\nbye\n", stderr="")
    monkeypatch.setattr(switches.subprocess, "run", lambda *args, **more: done)
    assert "bye" in switches.apart("digits-dmd2", [])


def test_the_kernels_table_goes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = record.RESULTS.read_bytes()
    measured = record.Row("attention", "cuda triton, N=8192", "TFLOP/s", "420", ">= 400")
    monkeypatch.setattr(attention, "gpu", lambda repeats: iter([measured]))
    attention.main([*gpu.command("kernels", tmp_path, False, 60)[3:]])
    assert record.RESULTS.read_bytes() == before
    row, _ = run("kernels", ["true"], 30, tmp_path)
    assert row == Row("kernels", "cuda triton, N=8192: TFLOP/s (goal >= 400)", "420")


def test_rows_of_a_gpu_come_first_and_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def found(repeats: int):
        yield record.Row("attention", "cuda", "a", "1")
        raise MemoryError

    monkeypatch.setattr(attention, "gpu", found)
    monkeypatch.setattr(attention, "cpu_self", lambda *args: pytest.fail("before the rows of the GPU"))
    with pytest.raises(MemoryError):
        attention.main(["--out", str(tmp_path / "rows.csv")])
    assert [row.metric for row in record.read(tmp_path / "rows.csv")] == ["a"]


def test_the_student_has_five_minutes_whatever_the_others_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert sum(SHARES.values()) + OWN == 540
    assert SHARES["student"] == TRAINING + SPARE == 420
    clock = [100.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    limits = {}
    for name, words, limit in parts(tmp_path, False, 540):
        limits[name] = limit
        if name == "student":
            assert {"seconds=300", "fashion-dmd2"} <= set(words)
        clock[0] += limit  # each takes all it may
    assert limits == SHARES
    assert clock[0] == 100 + 540 - OWN


def test_what_a_part_leaves_is_for_the_next_and_fewer_minutes_are_the_students(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = iter((0.0, 0.0, 350.0))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    found = parts(tmp_path, False, 540)
    next(found)
    name, _, limit = next(found)
    assert (name, limit) == ("sdxl", 540 - 350 - 25 - 20 - 15 - OWN)
    assert "seconds=60" in gpu.command("student", tmp_path, False, 60 + SPARE)


def test_only_files_with_tests_for_a_gpu_are_collected(tmp_path: Path):
    files = [Path(word).name for word in gpu.command("tests", tmp_path, False, 60) if word.endswith(".py")]
    assert sorted(files) == ["test_attention_gpu.py", "test_encoders.py"]


def comparison(folder: Path, **files: object) -> Path:
    for name, content in {"compare": {"evaluation": {"metric": "fd", "samples": 2000}}, **files}.items():
        path = folder / "student" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder / "student"


def test_a_student_that_was_ended_has_the_last_point_of_its_curve(tmp_path: Path):
    teacher = {"rows": [{"name": "teacher, 18 steps", "number": 2000, "metrics": {"fd": {"value": 7.125}}}]}
    comparison(tmp_path, **{"teachers/fashion-dmd2/result": teacher})
    run_folder = tmp_path / "student" / "fashion-dmd2" / "seed-0"
    run_folder.mkdir(parents=True)
    points = [{"updates": n, "seconds": n / 10, "cpu_seconds": 1, "network_calls": 1, "value": 900 / n} for n in (30, 60)]
    (run_folder / "curve.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points) + '{"upd')
    found = figures(run("student", ["sleep", "60"], 0.2, tmp_path))
    assert found["teacher, 18 steps: fd, N=2000"] == ("7.12", "")
    assert found["fashion-dmd2: fd, N=2000 at the curve's last point"] == ("15.00", "")
    assert found["fashion-dmd2: updates at the curve's last point"] == ("60", "")
    assert found["fashion-dmd2: training at the curve's last point"] == ("6", "s")
    assert "ended at its limit" in found


def test_a_whole_student_has_its_result_and_a_failed_one_its_message(tmp_path: Path):
    row = {"name": "x", "number": 2000, "metrics": {"fd": {"value": 9.5}, "kid": {"value": 1.0}}}
    comparison(
        tmp_path,
        **{
            "fashion-dmd2/seed-0/result": {"rows": [row], "updates": 1200, "seconds": 299.6},
            "teachers/fashion-dmd2/failure": {"message": "out of memory"},
        },
    )
    found = figures(run("student", ["true"], 30, tmp_path))
    assert found["fashion-dmd2: fd, N=2000"] == ("9.50", "")
    assert found["fashion-dmd2: training"] == ("300", "s")
    assert found["teachers/fashion-dmd2: failed"] == ("out of memory", "")
    assert figures(run("student", ["true"], 30, tmp_path / "student"))["said"] == ("", "")  # no comparison is there


def test_one_part_after_the_other_and_both_files_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The measure of the student reads the images too: where they are is told to all that it starts."""
    words = ["sh", "-c", 'echo "$FEWSTEP_FASHION_MNIST"; exit 1']
    monkeypatch.setattr(gpu, "command", lambda name, out, rehearse, limit: words)
    out = tmp_path / "out"
    main(["--rehearse", "--data", str(tmp_path), "--out", str(out)])
    with (out / "gpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows if row["value"] == str(tmp_path)] == [*SHARES]
    with pytest.raises(SystemExit, match="is not empty"):
        main(["--rehearse", "--out", str(out)])


def test_both_files_hold_all_rows(tmp_path: Path):
    rows = [Row("sdxl", "a step", "1.5", "s"), Row("tests", "said", "1 | 2")]
    write(rows, tmp_path)
    with (tmp_path / "gpu.csv").open(newline="") as file:
        assert [row["value"] for row in csv.DictReader(file)] == ["1.5", "1 | 2"]
    assert r"| tests | said | 1 \| 2 |  |  |" in (tmp_path / "gpu.md").read_text()


def test_the_site_shows_a_kept_page_with_its_estimates(tmp_path: Path):
    assert gpu.shown(tmp_path / "gpu.md") == "Not run: no GPU was at hand so far."
    write([Row("sdxl", "memory of a step", "21.5", "GiB", "20.25")], tmp_path)
    told = gpu.shown(tmp_path / "gpu.md")
    assert told.startswith("On ")
    assert "# " not in told
    assert "| sdxl | memory of a step | 21.5 | GiB | 20.25 |" in told


def test_without_a_gpu_it_says_what_can_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device is here; --rehearse"):
        main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
