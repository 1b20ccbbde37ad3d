"""What is printed of numbers fits a terminal: a line a row, values with as many digits as their error allows."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from fewstep.commands import report
from fewstep.commands.compare.ranking import markdown, page, rank
from fewstep.commands.compare.shown import show
from fewstep.commands.pictures import CELL, save_grid, tile
from fewstep.eval.protocol.evaluation import Evaluation

METRIC = "FD (effnet-lite0-224)"


def evaluation(name: str, value: float, error: float | None, **more: Any) -> Evaluation:
    entry = {"value": value, "standard_error": error, "values": [value], "spread": None}
    metrics = {METRIC: entry, "class accuracy (x)": {"value": 0.991}, "within-class diversity (x)": {"value": 0.9234}}
    return Evaluation(
        name=name, preset="p", preset_hash="0123456789ab", extractor="x", number=1797, metrics=metrics, calls=1, steps=1,
        seconds=12.5, environment={"commit": "0" * 40, "device": "CPU", "threads": "1"}, **more,
    )  # fmt: skip


def captured(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def test_the_table_of_a_run_is_a_line_a_row(monkeypatch: pytest.MonkeyPatch):
    console = captured(80)
    monkeypatch.setattr(report, "console", console)
    rows = [
        ("teacher, 1 step", 56.812, 2.834),
        ("teacher, 12 steps (best)", 2.98, 1.9),
        ("student, 1 step", 4.4951, 0.19),
    ]
    with console.capture() as shown:
        report.show([evaluation(*row) for row in rows])
    lines = [line.rstrip() for line in shown.get().splitlines()]
    assert lines[0] == "p (0123456789ab), 1,797 samples"
    assert lines[1].split() == ["FD", "accuracy", "diversity", "calls", "s", "/", "1000"]
    assert [line.split("  ")[0] for line in lines[2:5]] == [row[0] for row in rows]
    assert all(len(line) <= 80 for line in lines[:5])
    assert ["56.8 ± 2.8" in lines[2], "3.0 ± 1.9" in lines[3], "4.50 ± 0.19" in lines[4]] == [True] * 3


TRAINING = {
    "method": "dmd2", "updates": 1500, "seconds": 31.0, "cpu_seconds": 30.0, "network_calls": 23_040,
    "peak_memory_mib": 512.0,
}  # fmt: skip


def compared() -> tuple[Any, list[Evaluation]]:
    rows = [evaluation(n, v, 0.3, training=TRAINING) for n, v in (("digits-cd", 3.5), ("digits-dmd2", 1.25))]
    return rank(rows), [evaluation("teacher, 12 steps", 0.8, 0.2)]


@pytest.mark.parametrize("width", [80, 120])
def test_a_comparison_fits_the_terminal(width: int):
    ranked, teachers = compared()
    console = captured(width)
    with console.capture() as shown:
        show(console, "Comparison", ranked, teachers, [{"recipe": "toy/x", "seed": 1, "message": "no\nmore"}])
    lines = [line.rstrip() for line in shown.get().splitlines()]
    assert all(len(line) <= width for line in lines)
    first, second, teacher = (next(x for x in lines if n in x) for n in ("digits-dmd2", "digits-cd", "teacher, 12"))
    assert first.split()[:6] == ["1", "digits-dmd2", "1", "1.25", "±", "0.30"]
    assert "+2.25" in second
    assert second.startswith("2")
    assert "0.80 ± 0.20" in teacher
    assert ("1,500" in first) == (width == 120)
    assert lines[-1] == "failed: toy/x, seed 1: no"


def test_pages_say_rank_difference_and_whole_numbers(tmp_path: Any):
    ranked, teachers = compared()
    about = {
        "budget": "updates=1500", "seeds": [0], "settings": [], "environment": ranked[0][0].environment,
        "evaluation": {"metric": METRIC, "samples": 1797, "seed": 0},
    }  # fmt: skip
    told = page(tmp_path, "Comparison", about, ranked, teachers, []).read_text()
    assert "<th>rank</th><th>from the best, paired</th>" in told
    assert "<td>digits-dmd2</td><td>1</td><td></td>" in told
    assert "<td>digits-cd</td><td>2</td><td>+2.25</td>" in told
    assert "<td>teacher, 12 steps</td><td></td><td></td>" in told
    text = markdown("Comparison", about, ranked, teachers, [])
    for page_text in (told, text):
        assert "23,040" in page_text
        assert "e+04" not in page_text


def test_small_grids_are_seen(tmp_path: Any):
    from PIL import Image

    x = torch.full((4, 3, 16, 16), -1.0)
    save_grid(x, tmp_path / "a.png", per_row=4)
    assert Image.open(tmp_path / "a.png").size == (4 * 17 * (CELL // 16), 17 * (CELL // 16))
    # A place without a picture is white, as nothing is there.
    assert float(tile(x[:3], 2)[:, 16:, 16:].min()) == 1.0
