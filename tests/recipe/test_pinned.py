"""A recipe's repositories of the hub are kept to commits: in what a run writes, and when it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from calling import called
from tiny_hub import A, B, cache as cache, fill, served
from tiny_teacher import make_teacher, student_settings

import fewstep
from fewstep.config import Absent
from fewstep.recipe.pinned import as_begun, pinned, repositories
from fewstep.recipe.store import load, load_run

Call = Callable[..., tuple[int, str, str]]
SDXL = "paper/dmd2-sdxl-4step-lora"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    return partial(called, capfd)


def named(**settings: str) -> Any:
    return load(SDXL, [f"{k.replace('__', '.')}={v}" for k, v in settings.items()])


def test_teacher_encoder_and_vae_are_pinned(cache: Path, tmp_path: Path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model_index.json").write_text("{}")
    fill(cache, "org/a", tmp_path / "index", A)
    fill(cache, "org/a", tmp_path / "index", B, "v2")
    recipe = named(teacher__path="org/a", data__encoder__path="org/a@v2", data__vae="org/a")
    found: Any = pinned(recipe)
    assert (found.teacher.path, found.teacher.revision) == ("org/a", A)
    assert (found.data.encoder.path, found.data.vae) == (f"org/a@{B}", f"org/a@{A}")
    assert replace(found, teacher=recipe.teacher, data=recipe.data) == recipe
    assert pinned(found) is not recipe
    assert pinned(found) == found
    assert [r.path for r in repositories(found)] == [f"org/a@{A}", f"org/a@{B}"]
    digits = load("digits-dmd2")
    assert pinned(digits) is digits


def test_one_that_is_not_there_is_named_by_key(cache: Path):
    with pytest.raises(Absent, match=r"^data\.encoder\.path org/b@v1: no such folder.*`hf download org/b --revision v1`"):
        pinned(load("digits-dmd2", ["data={name: prompts, path: p.txt, shape: [4, 8, 8], encoder: {name: pipeline, "
                                    "path: org/b@v1}}", "student={name: copy, of: teacher}"]))  # fmt: skip


def test_a_run_goes_on_at_its_commit(cache: Path):
    begun = named(teacher__path="org/a", teacher__revision=A, data__encoder__path=f"org/a@{A}", data__vae=f"org/b@{B}")
    again: Any = as_begun(named(teacher__path="org/a", data__encoder__path="org/c", data__vae="org/b"), begun)
    assert again.teacher.revision == A
    assert (again.data.encoder.path, again.data.vae) == ("org/c", f"org/b@{B}")
    other = named(teacher__path="org/a", teacher__revision="v2", data__vae="org/b@v2")
    assert as_begun(other, begun) == other


def settings() -> list[str]:
    return [s for s in student_settings(Path("org/tiny")) if not s.startswith("train.steps")]


def test_a_run_writes_the_commit_and_finds_it_again(cache: Path, teacher: Path, call: Call):
    snapshot = fill(cache, "org/tiny", teacher)
    fill(cache, "org/tiny", make_teacher(Path("other"), classes=9), B, "v2")
    start = ("run", "digits-dmd2", *settings(), "--out", "r")
    fewstep.Trainer(load("digits-dmd2", [*settings(), "train.steps=1"]), "r", cpu=True).fit()
    kept: Any = load_run(Path("r")).teacher
    assert (kept.path, kept.revision) == ("org/tiny", A)
    (cache / "models--org--tiny" / "refs" / "main").write_text(B)  # a later download
    code, out, err = call(*start, "train.steps=2", "--resume")
    assert code == 0, err
    assert f"org/tiny of the Hugging Face hub at {A}" in out
    assert "continued at step 1" in out
    assert load_run(Path("r")).teacher == kept
    assert fewstep.open_product("r").draw(2).shape == (2, 1, 8, 8)
    code, _, err = call(*start, "train.steps=2", "teacher.revision=v2", "--resume")
    assert code == 2
    assert f"teacher.revision: '{A}' -> '{B}'" in err
    snapshot.rename(snapshot.with_name("c" * 40))  # another machine
    code, _, err = call(*start, "train.steps=3", "--resume")
    assert code == 2
    assert f"`hf download org/tiny --revision {A}`" in err
    assert err.count("\n") == 1


def test_only_download_reaches_the_hub(tmp_path: Path, teacher: Path, call: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with served(monkeypatch, tmp_path / "cache") as there:
        there.files["org/tiny"] = {p.relative_to(teacher).as_posix(): p.read_bytes() for p in teacher.rglob("*.*")}
        for command in (
            ("recipes", "check", "digits-dmd2", *settings()),
            ("plan", "digits-dmd2", *settings()),
            ("run", "digits-dmd2", *settings(), "--out", "r"),
            ("check-teacher", "org/tiny"),
            ("fit", "org/tiny", "--out", "f"),
            ("new", "--teacher", "org/tiny", "--steps", "4", "--out", "m.yaml"),
        ):
            code, _, err = call(*command)
            assert code == 2
            assert "`hf download org/tiny --revision main`" in err
        assert there.asked == []
        code, out, err = call("recipes", "check", "digits-dmd2", *settings(), "--download")
        assert code == 0, err
        assert "HEAD org/tiny/resolve/" + B + "/unet/config.json" in there.asked
        there.asked.clear()
        assert call("recipes", "check", "digits-dmd2", *settings())[1] == out
        assert call("check-teacher", "org/tiny")[0] == 0
        assert there.asked == []
