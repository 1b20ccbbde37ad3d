"""A user's first job as a user does it: pictures in, a student, a number and a pipeline for plain diffusers out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_new import make_pictures
from tiny_runs import python

from fewstep.cli import main

BRIEF = ("student.channels=[8,16]", "train.steps=2", "train.batch=4", "evaluate.samples=8", "evaluate.teacher_steps=[1]")
SHORT = ("train.steps=2", "train.batch=4", "evaluate.samples=8", "evaluate.teacher_steps=[1]")
ALONE = """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
exec(sys.argv[2])
assert "fewstep" not in sys.modules
"""


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    assert not caught.value.code, arguments


@pytest.mark.parametrize(
    ("classes", "method"),
    [pytest.param(3, "dmd2", marks=pytest.mark.long), (0, "consistency")],
    ids=["class folders", "flat folder"],
)
def test_own_photos_to_a_measured_and_exported_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int, method: str, capfd: pytest.CaptureFixture[str]
):
    """Four commands, no edit: photos of mixed sizes, with and without classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    for n, size in enumerate(((16, 16), (20, 24), (33, 17))):
        make_pictures(tmp_path / "photos" / ("" if not classes else f"kind {n}"), 4, size)
        for p in (tmp_path / "photos").rglob("?.png"):
            p.rename(p.with_name(f"{n}-{p.name}"))
    run("new", "--data", "photos", "--steps", 1, "--method", method, "--out", "mine.yaml")
    run("run", "mine-teacher.yaml", *BRIEF)
    run("run", "mine.yaml", *SHORT)
    for name, rows in (("mine-teacher", 1), ("mine", 2)):
        report = json.loads((tmp_path / "runs" / name / "report" / "results.json").read_text())
        measured = [set(row["metrics"]) for row in report["rows"]]
        assert len(measured) >= rows
        assert all({"FD", "KID"} <= {name.split()[0] for name in found} for found in measured), measured
    capfd.readouterr()
    run("eval", "runs/mine", "--against", "photos", "--samples", 8)
    shown = capfd.readouterr().out
    assert "FD" in shown
    assert "KID" in shown
    call = "pipe(batch_size=1, num_inference_steps=1" + (", class_labels=[2])" if classes else ")")
    python(ALONE, str(tmp_path / "runs" / "mine" / "export"), f"assert {call}.images[0].size == (16, 16)", cwd=tmp_path)
