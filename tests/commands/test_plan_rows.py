"""The plan of a recipe that names code, which is not run: the rows that need none, and what is left out by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tiny_pictures import write
from tiny_teacher import make_teacher, student_settings

from fewstep.cli import main
from fewstep.commands.plan import plan
from fewstep.commands.plan_rows import without_code
from fewstep.config import RecipeError
from fewstep.networks import code
from fewstep.recipe.store import load

BAD = "raise SystemExit('this code was run')"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(BAD)
    return tmp_path / "mine.py"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_are_those_of_the_same_recipe_without_code(tmp_path: Path, mine: Path, dtype: str):
    settings = [*student_settings(make_teacher(tmp_path / "t")), f"teacher.dtype={dtype}", "train.ema=[0.9, 0.99]"]
    settings.append("critic={name: copy, of: student}")
    whole = plan(load("digits-dmd2", settings), ways=False).roles
    rows, missing = without_code(load("digits-dmd2", [*settings, f"teacher.wrapper='{mine}:Mine'"]))
    assert rows == {name: whole[name] for name in ("teacher", "student", "critic")}
    assert missing == ["discriminator", "activations"]


def test_roles_of_their_own_are_known_where_the_teacher_is_not(mine: Path):
    factory = f"teacher={{name: module, factory: '{mine}:build', arguments: {{x: x, time: t}}, prediction: velocity, "
    settings = [factory + "time_input: t, process: {name: flow}}", "critic={name: lora, of: teacher}", "copy={}"]
    rows, missing = without_code(load("toy/dmd2", settings))
    assert rows["student"] == plan(load("toy/dmd2"), ways=False).roles["student"]
    assert (list(rows), missing) == (["student"], ["teacher", "critic", "activations"])


def test_labels_that_a_run_refuses_are_refused(tmp_path: Path, mine: Path):
    for c in range(1, 11):
        write(tmp_path / "d" / str(c), x_png=Image.new("L", (8, 8)))
    settings = [f"data={{name: images, path: {tmp_path / 'd'}, grey: true}}", f"teacher.wrapper='{mine}:Mine'"]
    with pytest.raises(RecipeError, match=r"house-classifier\.of digits: knows classes by their numbers, and in the dat"):
        without_code(load("digits-dmdr", [*settings, "evaluate=null"]))
    assert "reward" in without_code(load("digits-dmdr", [*settings, "evaluate=null", "data.renumber=true"]))[0]


@pytest.mark.parametrize("measure", [[], ["--measure"]])
def test_the_command_says_what_it_did_not_plan(mine: Path, measure: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["plan", "digits-dmd2", f"teacher.wrapper='{mine}:Mine'", *measure])
    out, err = capsys.readouterr()
    assert left.value.code == 3
    assert f"plan runs no code that a recipe names (teacher.wrapper {mine}:Mine)\n" in out
    assert "not planned: discriminator, activations, the worst moment\n" in out
    assert ("not measured: --measure would run it\n" in out) == bool(measure)
    assert "--trust-code" not in out + err
    assert "teacher" in out.partition("not planned")[0]


def test_code_that_was_allowed_in_python_is_planned(mine: Path):
    recipe = load("digits-dmd2", [f"teacher.wrapper='{mine}:Mine'"])
    code.allow(recipe)
    with pytest.raises(SystemExit, match="this code was run"):
        plan(recipe)
