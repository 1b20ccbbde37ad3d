"""The bar, the steps and the time left are seen on every terminal; where there is none, lines say it."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from fewstep.commands.progress import TrainingBar, Watch, alarmed, clock, drawing, readings

RECORD = {
    "done": 300, "stage": 1, "skips": 0, "discriminator": 0.0132, "discriminator_accuracy": 0.609, "dsm": 0.335,
    "gan": 0.24, "matching": 0.017, "grad_norm/student": 2.0, "health/diversity": 0.4, "lr/student": 1e-4,
    "seconds": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("total", [700, 200_000])
def test_bar_steps_and_time_left_are_whole_at_every_width(width: int, total: int):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bar = TrainingBar(console, total)
    bar.show(300, readings(RECORD))
    with console.capture() as shown:
        console.print(bar.get_renderable())
    first, second = (line.rstrip() for line in shown.get().splitlines())
    assert len(first) <= width
    assert "…" not in first
    assert re.fullmatch(rf"train [━╸╺─ ]{{8,}} +300/{total} 0:00:\d\d ETA [-\d:]+", first), first
    assert second.startswith("dsm 0.335  gan 0.24  matching 0.017")
    assert len(second) <= width
    assert second.endswith("discriminator_accuracy 0.609") == (width >= 100)


def test_lines_carry_the_time_left_and_no_empty_reading(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("fewstep.commands.progress.time.perf_counter", lambda: now[0])
    watch = Watch(1000, 400)  # continued at step 400
    now[0] += 60
    assert watch.line(500, "dsm 0.3") == "step 500/1000  0:01:00, about 0:05:00 left  dsm 0.3"
    assert watch.line(1000, "") == "step 1000/1000  0:01:00"
    assert [n for n in range(401, 1001) if watch.due(n)] == [500, 600, 700, 800, 900, 1000]
    assert clock(3725.6) == "1:02:06"


def test_readings_are_losses_alone_the_discriminators_last():
    assert readings(RECORD) == "dsm 0.335  gan 0.24  matching 0.017  discriminator 0.0132  discriminator_accuracy 0.609"
    assert readings({}) == ""


def test_alarms_are_those_of_health():
    rows = [{"done": i, "stage": 0, "samples/mean": 0.0 if i < 8 else -1.0} for i in range(20)]
    assert alarmed(rows) == "ALARM darkening"
    assert alarmed(rows[:8]) == ""
    assert readings({"samples/mean": -1.0, "dsm": 0.3}) == "dsm 0.3"


def test_a_measurement_tells_how_far_it_is_by_tenths_and_not_if_it_is_short(monkeypatch: pytest.MonkeyPatch):
    now, said = [50.0], []
    monkeypatch.setattr("fewstep.commands.progress.time.perf_counter", lambda: now[0])

    def drawn(seconds: float) -> list[str]:
        said.clear()
        with drawing("teacher, 8 steps", 5000, said.append, Console(file=io.StringIO())) as told:
            for _ in range(50):
                now[0] += seconds
                told(100)
        return list(said)

    assert drawn(0.3) == []
    slow = drawn(10.0)
    assert slow[0] == "teacher, 8 steps: 500 of 5,000 samples drawn  0:00:50, about 0:07:30 left"
    assert len(slow) == 9  # no line where all are there
    with drawing("again", 1000, said.append, Console(file=io.StringIO())) as told:
        told(800, kept=True)
        now[0] += 30.0
        told(100)
    assert said[-1] == "again: 900 of 1,000 samples drawn  0:00:30, about 0:00:30 left"  # at the speed of the new ones
    few = drawn(1.0)
    assert [line.split(" ")[3] for line in few] == ["2,000", "4,000"]


def test_a_measurement_on_a_terminal_has_a_bar_which_goes():
    file, said = io.StringIO(), []
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    with drawing("teacher [8 steps]", 40, said.append, console) as told:
        told(40)
    shown = file.getvalue()
    assert "teacher [8 steps]" in shown
    assert "40/40" in shown
    assert shown.endswith("\x1b[2K")  # the line is wiped
    assert not said
