"""Recipes whose keys are each right and that would train and then fail: refused by their key."""

from __future__ import annotations

import re

import pytest

from fewstep.algebra.views import Frame, Mirror, seen_shape
from fewstep.commands.check_roles import look
from fewstep.config import RecipeError
from fewstep.recipe.faults import check_views
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load
from fewstep.train.build import build_roles


def refused(name: str, *settings: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(name, list(settings))
    return str(caught.value)


def test_contiguous_asks_for_a_pruned_student():
    said = refused("toy/ppcl", "student={name: copy, of: whole}")
    assert re.search(r"before\.1\.method: contiguous trains blocks .*; the student, mlp, has none", said), said
    # A copy of a pruned network is one.
    assert load(
        "toy/ppcl", ["roles.cut={name: pruned, of: teacher, intervals: [[1, 2]]}", "student={name: copy, of: cut}"]
    )


def test_correct_asks_for_iterates():
    said = refused("digits-get", "student={name: dit}")
    assert re.search(r"method\.correct: is for a student with iterates, and dit has none", said), said
    assert refused("digits-kd", "method.steps=[1.0]", "method.correct=0.8").count("diffusers has none")
    assert load("digits-get", ["student={name: dit}", "method.correct=null"])


def with_view(view: str) -> Recipe:
    experts = f"[{{kind: vsd}}, {{kind: vsd, critic: critic_behind, view: {view}}}]"
    return load("toy/factorised", [f"method.experts={experts}"])


@pytest.mark.parametrize("view", ["{name: frame}", "{name: coarse}"])
def test_views_of_other_shapes_are_refused_by_check_and_by_building(view: str):
    recipe = with_view(view)
    words = r"method\.experts\.1\.view: view (frame|coarse): needs (videos|pictures) .*not \[2\]"
    with pytest.raises(RecipeError, match=words):
        build_roles(recipe, recipe.data.open())
    with pytest.raises(RecipeError, match=words):
        look(recipe)
    check_views(with_view("{name: negative}"), (2,))


def test_the_view_of_a_stage_before_is_tried_too():
    recipe = load("digits-eve", ["before.1.method.view={name: coarse, factor: 3}"])
    with pytest.raises(RecipeError, match=r"^before\.1\.method\.view: view coarse: needs pictures whose sides 3 divides"):
        check_views(recipe, (1, 8, 8))


def test_views_one_after_the_other():
    assert seen_shape([Mirror(), Frame()], (3, 5, 4, 6)) == (3, 4, 6)
    with pytest.raises(ValueError, match="needs videos"):
        seen_shape([Frame(), Frame()], (3, 5, 4, 6))


def test_which_points_are_there_is_nothing_to_be_guided_away_from():
    settings = ["data.shortest=10", "method.guidance=2.0"]
    assert refused("helices-sid", *settings).count("method.guidance: a guidance scale of 2")
    assert load("helices-sid", settings[:1])


def test_roles_that_step_together_have_one_rule_and_size_of_moments():
    told = refused("paper/sana-sprint", "optim.student.rule=adamw")
    assert "optim: the roles of one update step together, so give them one rule and bits, not " in told
    assert "student adamw of 32 bits" in told
    assert "weighting came of 32 bits" in told
    assert "discriminator adamw of 8 bits" in refused("digits-dmd2", "optim.discriminator.bits=8")
    load("digits-dmd2", ["optim.student.bits=8"])  # which steps alone
