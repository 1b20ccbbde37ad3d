"""What `fewstep recipes diff` prints, and the recipes of published settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.config import UserError
from fewstep.recipe.diff import diff, published
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load

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
    assert not any(line.startswith(("data", "teacher", "evaluate", "results", "optim.default")) for line in lines)
    # A part of another kind is one line: an index and a level in [0, 1] are not the same key.
    assert any(line.startswith("method.times: {'name': 'uniform', ") for line in lines)
    assert not any(line.startswith(("method.times.", "method.critic.times.")) for line in lines)
    assert lines[-1].startswith("others of its kind: paper/dmd2-sdxl-1step")
    # What only another process writes otherwise stands apart from what was chosen otherwise.
    apart = lines.index("in the notation of another process or prediction, so not one to one:")
    keys = [line.partition(":")[0] for line in lines[apart + 1 : -1]]
    assert keys == ["method.critic.times", "method.critic.weight", "method.times"]
    assert lines.index("method.guidance: 1.0 -> 1.75") < apart
    four = published(load("digits-dmd2-4step", ["method.guidance=8.0"]), "x")[0]
    assert four.startswith("paper/dmd2-sdxl-4step")


def test_what_cannot_be_compared_says_so():
    with pytest.raises(UserError, match="name a second recipe, or add --paper"):
        diff("toy/dmd2", None, False)
    with pytest.raises(UserError, match="these are published settings; name a second recipe in place of --paper"):
        diff("paper/meanflow-dit-xl", None, True)
    with pytest.raises(UserError, match="--paper chooses the second recipe itself"):
        diff("toy/dmd2", "toy/cd", True)
    with pytest.raises(UserError, match=r"no published settings of boot are shipped; there are .*dmd2"):
        diff("toy/boot", None, True)


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("toy/lcm", "paper/lcm-sd15"),
        ("digits-lcm", "paper/lcm-sd15"),
        ("toy/tscd", "paper/tscd-sd15"),
        ("toy/meanflow-scratch", "paper/meanflow-dit-xl"),
        ("digits-phased-dmd-2step", "paper/phased-dmd-flow"),
        ("emoji-dmd2-lora", "paper/dmd2-sd15"),
    ],
)
def test_published_settings_are_of_the_recipes_own_kind(name: str, like: str):
    assert published(load(name), name)[0] == like


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("toy/ict", "ict are shipped; there are paper/lcm-sd15 (lcm), paper/lcm-sdxl (lcm)"),
        ("toy/cd", "cd are shipped; there are paper/lcm-sd15 (lcm)"),
        ("toy/pcm", "pcm are shipped; there are paper/tscd-sd15 (tscd), paper/tscd-sdxl (tscd)"),
        ("toy/meanflow", "ayf or meanflow are shipped; there are paper/meanflow-dit-xl (meanflow-scratch)"),
        ("digits-sid", "sid are shipped; there are paper/sid-lsg-sd15 (sid-lsg)"),
        ("digits-sim", "sim are shipped"),
        ("digits-sida", "sida are shipped"),
        ("digits-inverse-matching", "inverse-matching are shipped"),
        ("toy/rcm", "scm + dmd2 are shipped; there are paper/sana-sprint (scm + ladd)"),
    ],
)
def test_published_settings_of_another_kind_are_no_yardstick(name: str, told: str):
    with pytest.raises(UserError) as caught:
        diff(name, None, True)
    assert str(caught.value).startswith(f"no published settings of {told}")


def test_published_settings_say_that_they_were_not_run():
    assert len(PAPER) >= 14
    for name in PAPER:
        recipe = load(name)
        assert recipe.about.endswith("(paper settings, not run here)"), name
        assert recipe.evaluate is None
        assert not any(r.source == "measured" for r in recipe.results)


def test_the_command_prints_them(tmp_path: Path):
    from typer.testing import CliRunner

    from fewstep.cli import app

    done = CliRunner().invoke(app, ["recipes", "diff", "toy/dmd2", "toy/dmd2"])
    assert done.exit_code == 0
    assert done.output == "toy/dmd2 and toy/dmd2 are the same\n"
