"""A sheet of runs: the data's pictures first, one teacher, then each student by its run's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fewstep.bench.wall import main, rows
from fewstep.commands.sample_text import Row
from fewstep.config import UserError
from fewstep.recipe.store import dump, load

TEACHER = torch.tensor([0.8, 0.2, -0.2]).reshape(1, 3, 1, 1)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two run directories that hold a recipe each; what they draw is their number."""
    made = []
    for name in ("one", "four"):
        made.append(tmp_path / name)
        made[-1].mkdir()
        (made[-1] / "recipe.yaml").write_text(dump(load("emoji-dmd2")))

    def of_run(run: Path, prompts: list[str], *_: Any, **__: Any) -> list[Row]:
        teacher = _[3]
        student = [("student, 1 step", (0.5 if run == made[0] else 10.0) * TEACHER.expand(len(prompts), 3, 32, 32))]
        return [*[(f"teacher, {teacher} steps", TEACHER.expand(len(prompts), 3, 32, 32))] * bool(teacher), *student]

    monkeypatch.setattr("fewstep.bench.wall.of_run", of_run)
    return made


def test_data_then_one_teacher_then_each_student(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found, (banana, apple) = rows(runs, ["banana", "red apple"], 8)
    assert [name for name, _ in found] == ["data", "teacher, 8 steps", "one, 1 step", "four, 1 step"]
    assert {len(x) for _, x in found} == {131}
    data = found[0][1]
    # Yellow is red and green, red is red alone; white, around them, is all.
    assert (data[apple, 0] - data[apple, 1]).mean() > (data[banana, 0] - data[banana, 1]).mean() + 0.1
    out = tmp_path / "wall.png"
    main([*map(str, runs), "--prompt", "banana", "red apple", "--out", str(out)])
    with Image.open(out) as sheet:
        assert sheet.height > 4 * 64
    told = capsys.readouterr().out
    assert "saturation over 131 captions" in told
    assert "one, 1 step: 0.500, 0.50 of teacher, 8 steps\nfour, 1 step: 2.000, 2.00 of teacher, 8 steps\n" in told


def test_a_caption_without_a_picture_is_told(runs: list[Path]):
    with pytest.raises(UserError, match=r"--prompt 'blue apple': .* has no picture of it"):
        rows(runs, ["blue apple"], 8)


def test_runs_of_one_name_are_told_by_their_folders(runs: list[Path], tmp_path: Path):
    (tmp_path / "again").mkdir()
    same = runs[0].rename(tmp_path / "again" / "four")
    found, _ = rows([same, runs[1]], ["banana"], 0)
    assert [name for name, _ in found] == ["data", "again/four, 1 step", f"{tmp_path.name}/four, 1 step"]
