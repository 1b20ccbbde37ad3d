"""Code that a recipe names runs only where it was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.cli import main
from fewstep.commands.trust import allow_own_code
from fewstep.config import UserError
from fewstep.networks import code
from fewstep.recipe.store import load

EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
    def forward(self, x, t):
        return self.layer(x)
def build():
    return Net()
"""
FACTORY = """
extends: toy/dmd2
teacher: {{name: module, factory: "{path}:build", arguments: {{x: x, time: t}}, prediction: velocity, time_input: t,
  process: {{name: flow}}}}
critic: {{name: mlp}}
student: {{name: mlp}}
before: []
copy: {{}}
train: {{steps: 1, batch: 4, sample_every: 0}}
evaluate: null
"""
WRAPPER = """
extends: digits-dmd2
teacher: {{name: diffusers, path: assets:digits-teacher, wrapper: "{path}:Mine"}}
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(code, "_allowed", set())
    monkeypatch.setattr(code, "_everything", [False])
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=[FACTORY, WRAPPER], ids=["factory", "wrapper"])
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A recipe whose code lies elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "evil.py").write_text(EVIL)
    recipe = tmp_path / "recipes" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text(request.param.format(path=tmp_path / "elsewhere" / "evil.py"))
    return recipe


def ended(*arguments: object) -> int:
    """The exit code of a command in this process."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def ran(tmp_path: Path) -> bool:
    return bool(list(tmp_path.rglob("ran")))


@pytest.mark.parametrize("command", ["recipes check", "recipes show", "recipes diff toy/dmd2", "plan"])
def test_looking_at_a_recipe_runs_nothing(foreign: Path, tmp_path: Path, command: str):
    ended(*command.split(), foreign)
    assert not ran(tmp_path)


def test_running_foreign_code_needs_the_word(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    assert ended("run", foreign, "--out", out) == 2
    told = capsys.readouterr().err
    assert "is code that would be run" in told
    assert code.digest(f"{tmp_path / 'elsewhere' / 'evil.py'}:x")[:16] in told
    assert "--trust-code" in told
    assert not ran(tmp_path)
    assert not out.exists()


def own(tmp_path: Path) -> Path:
    (tmp_path / "evil.py").write_text(EVIL)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(FACTORY.format(path=tmp_path / "evil.py"))
    return recipe


def test_the_code_beside_a_recipe_is_shown_and_run_and_the_run_opens_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    recipe, out = own(tmp_path), tmp_path / "run"
    assert ended("run", recipe, "--out", out) == 0
    assert ran(tmp_path)
    assert f"sha256 {code.digest(f'{tmp_path}/evil.py:build')}" in capsys.readouterr().out
    # Another process: what was allowed there is forgotten, but the cache knows the directory.
    monkeypatch.setattr(code, "_allowed", set())
    assert ended("sample", out, "--count", 4, "--out", tmp_path / "grid.png") == 0
    monkeypatch.setattr(code, "_allowed", set())
    moved = out.rename(tmp_path / "downloaded")
    assert ended("sample", moved, "--out", tmp_path / "grid.png") == 2
    assert "--trust-code" in capsys.readouterr().err
    assert ended("sample", moved, "--count", 4, "--out", tmp_path / "grid.png", "--trust-code") == 0


def test_a_run_whose_code_has_changed_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = load(str(own(tmp_path)))
    run = tmp_path / "run"
    code.remember(run, recipe)
    code.allow_made_here(run, recipe)
    code.require(recipe)
    monkeypatch.setattr(code, "_allowed", set())
    (tmp_path / "evil.py").write_text(EVIL + "\n# and more")
    code.allow_made_here(run, recipe)
    with pytest.raises(UserError, match="is code that would be run"):
        code.require(recipe)


def test_code_that_changes_after_it_was_allowed_is_refused(tmp_path: Path):
    recipe = load(str(own(tmp_path)))
    code.allow(recipe)
    code.require(recipe)
    (tmp_path / "evil.py").write_text(EVIL + "\n")
    with pytest.raises(UserError, match="is code that would be run"):
        code.require(recipe)


def test_what_stands_on_the_command_line_was_asked_for(foreign: Path):
    recipe = load(str(foreign))
    ((key, value),) = code.named(recipe).items()
    allow_own_code(str(foreign), [], recipe)
    assert not code.is_allowed(value)
    allow_own_code(str(foreign), [f"{key}={value}"], recipe)
    assert code.is_allowed(value)


def test_a_module_is_found_without_its_package_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "__init__.py").write_text(EVIL)
    (tmp_path / "mypackage" / "nets.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert code.file_of("mypackage.nets:build") == tmp_path / "mypackage" / "nets.py"
    assert code.file_of("mypackage:build") == tmp_path / "mypackage" / "__init__.py"
    assert code.file_of("nowhere.nets:build") is None
    assert code.digest("nowhere.nets:build") == ""
    assert not ran(tmp_path)
