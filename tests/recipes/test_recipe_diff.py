"""What `fewstep recipes diff` prints, and the recipes of published settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.config import UserError
from fewstep.recipe.diff import diff, published
from fewstep.recipe.store import load, shipped

PAPER = sorted(n for n in shipped() if n.startswith("paper/"))


def test_two_recipes_differ_in_what_one_says():
    lines = diff("toy/dmd2", "toy/dmd2", False)
    assert lines == "toy/dmd2 and toy/dmd2 are the same"
    lines = diff("toy/dmd2", "toy/dmd2", False, ["train.batch=7", "method.critic.steps=9"]).splitlines()
    plain = load("toy/dmd2")
    assert lines == [
        f"method.critic.steps: 9 -> {plain.method.critic.steps}",
        f"train.batch: 7 -> {plain.train.batch}",
    ]


def test_a_recipe_against_the_published_settings():
    lines = diff("digits-dmd2", None, True).splitlines()
    assert lines[0].startswith("digits-dmd2 -> paper/dmd2-sd15 (DMD2 of SD1.5 to one step")
    assert "method.guidance: 1.0 -> 1.75" in lines
    assert "train.batch: 64 -> 2048" in lines
    # Compared role by role, whether a rate stands under the role or under `default`.
    rate = load("digits-dmd2").optimizer("student").lr
    assert f"optim.student.lr: {rate} -> 1e-05" in lines
    assert not any(
        line.startswith(("data", "teacher", "evaluate", "results", "optim.default")) for line in lines
    )
    assert lines[-1].startswith("others with the method dmd2: paper/dmd2-sdxl-1step")
    four = published(load("digits-dmd2-4step", ["method.guidance=8.0"]), "x")[0]
    assert four.startswith("paper/dmd2-sdxl-4step")


def test_what_cannot_be_compared_says_so():
    with pytest.raises(UserError, match="name a second recipe, or add --paper"):
        diff("toy/dmd2", None, False)
    with pytest.raises(UserError, match="--paper chooses the second recipe itself"):
        diff("toy/dmd2", "toy/cd", True)
    with pytest.raises(
        UserError, match=r"no published settings of the method boot are shipped; there are .*dmd2"
    ):
        diff("toy/boot", None, True)


def test_published_settings_say_that_they_were_not_run():
    assert len(PAPER) >= 14
    for name in PAPER:
        recipe = load(name)
        assert recipe.about.endswith("(paper settings, not run here)"), name
        assert recipe.evaluate is None
        assert not any(r.source == "measured" for r in recipe.results)


def test_published_numbers_are_the_published_ones():
    # From the methods' published tables, iterations of the critic converted to student updates.
    one, four = load("paper/dmd2-sd15"), load("paper/dmd2-sdxl-4step")
    assert (one.train.steps, one.train.batch, one.method.critic.steps, one.method.guidance) == (
        3900,
        2048,
        10,
        1.75,
    )
    assert (four.train.steps, four.train.batch, four.method.critic.steps, four.method.guidance) == (
        3800,
        128,
        5,
        8.0,
    )
    assert [round(1000 * u) - 1 for u in four.method.steps] == [999, 749, 499, 249]
    assert [round(1000 * u) - 1 for u in load("paper/dmd2-sdxl-1step").method.steps] == [399]
    lora = load("paper/dmd2-sdxl-4step-lora")
    assert (lora.student.rank, lora.student.alpha, lora.optimizer("student").lr) == (64, 8.0, 5e-5)
    assert lora.optimizer("critic").lr == 5e-7
    tdd = load("paper/tdd-sdxl")
    assert (tdd.method.guidance, tdd.train.batch, tdd.train.steps, tdd.student.rank) == (4.5, 64, 100_000, 64)


def test_the_command_prints_them(tmp_path: Path):
    from typer.testing import CliRunner

    from fewstep.cli import app

    done = CliRunner().invoke(app, ["recipes", "diff", "toy/dmd2", "toy/dmd2"])
    assert done.exit_code == 0
    assert done.output == "toy/dmd2 and toy/dmd2 are the same\n"
