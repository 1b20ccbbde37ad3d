"""--assist and --path: options read or refused by name, a student with its teacher's help in every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calling import called
from PIL import Image
from tiny_teacher import make_run, make_teacher, student_settings

from fewstep.commands.assisting import parse_assist
from fewstep.config import RecipeError, UserError
from fewstep.networks.assisted import Adaptive, DistillationPP, Diversity
from fewstep.networks.scores import ClassScore


def test_a_name_with_keys_or_a_mapping_is_a_part():
    assert parse_assist("diversity") == Diversity()
    assert parse_assist("diversity:substeps=5,guidance=2.0") == Diversity(substeps=5, guidance=2.0)
    assert parse_assist("{name: distillation_pp, weight: 0.5, first: 2}") == DistillationPP(weight=0.5, first=2)
    assert parse_assist("adaptive:k=30,mode=regenerate,score=class") == Adaptive(
        k=30.0, mode="regenerate", score=ClassScore()
    )
    for text, words in (
        ("divers", "'divers' is not one of distillation_pp, diversity, adaptive, nasa"),
        ("diversity:substeps", "expected key=value after the name"),
        ("{name: [", "cannot be read"),
        ("{k: 3}", "None is not one of"),
    ):
        with pytest.raises(UserError, match=words):
            parse_assist(text)
    with pytest.raises(RecipeError, match="substps"):
        parse_assist("diversity:substps=5")
    with pytest.raises(RecipeError, match="weight"):
        parse_assist("distillation_pp:weight=2")


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))

    def run(*arguments: Any) -> tuple[int, str]:
        code, out, err = called(capfd, *arguments)
        return code, " ".join((out + err).split())

    return run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "student", teacher, "method.steps=[1.0, 0.4]")


def test_commands_take_help(call: Callable[..., Any], student: Path, teacher: Path, tmp_path: Path):
    out = tmp_path / "x.png"
    code, said = call("sample", student, "--count", 10, "--assist", "diversity:substeps=2", "--out", out)
    assert code == 0, said
    assert "with diversity, 3 calls each" in said
    plain = call("sample", student, "--count", 10, "--out", tmp_path / "plain.png")
    assert plain[0] == 0
    assert out.read_bytes() != (tmp_path / "plain.png").read_bytes()
    preset = ("--preset", "fd-house-digits", "--samples", 20)
    code, said = call("eval", student, *preset, "--assist", "distillation_pp", "--report", tmp_path / "report")
    assert code == 0, said
    rows = json.loads((tmp_path / "report" / "report.json").read_text())
    names = {r["name"]: r["calls"] for r in (rows["results"] if isinstance(rows, dict) else rows)}
    assert names == {"student, 2 steps": 2, "student, 2 steps + distillation_pp": 3}
    code, said = call("eval", teacher, *preset, "--steps", 1, "--assist", "diversity")
    assert code == 2
    assert "--assist: " in said
    assert "only a run knows its teacher" in said
    code, said = call("sample", teacher, "--assist", "diversity", "--out", out)
    assert code == 2
    assert "has no teacher that could help" in said


def test_a_recipe_names_help_for_its_own_table(call: Callable[..., Any], teacher: Path, tmp_path: Path):
    settings = [s for s in student_settings(teacher) if not s.startswith("evaluate")]
    assist = "{name: adaptive, k: 50, score: {name: class}, calibration: 10, steps: 1}"
    told = f"evaluate={{metric: fd-house-digits, samples: 20, teacher_steps: [], assist: {assist}}}"
    code, said = call("run", "digits-dmd2", *settings, told, "--out", tmp_path / "run")
    assert code == 0, said
    rows = json.loads((tmp_path / "run" / "report" / "results.json").read_text())["rows"]
    assert [(r["name"], r["calls"]) for r in rows] == [("student, 1 step + adaptive", 1.5), ("student, 1 step", 1)]


def test_a_path_shows_every_step_of_teacher_and_student(call: Callable[..., Any], student: Path, tmp_path: Path):
    out = tmp_path / "path.png"
    code, said = call("sample", student, "--path", "--count", 2, "--teacher", 3, "--out", out)
    assert code == 0, said
    assert "x0 at every step of teacher, student, 2 samples" in said
    with Image.open(out) as picture:
        wide, high = picture.size
    call("sample", student, "--path", "--count", 1, "--teacher", 0, "--out", out)
    with Image.open(out) as picture:
        assert picture.size[0] < wide  # 2 steps in place of 3
        assert picture.size[1] < high
    for more, words in (
        (("--count", 17), "a path shows 1 to 16 samples"),
        (("--assist", "diversity"), "--path: shows a student's own steps"),
        (("--prompt", "a cat"), "--assist and --path: are for samples of a run's own conditions"),
    ):
        code, said = call("sample", student, "--path", *more, "--out", out)
        assert code == 2
        assert words in said
