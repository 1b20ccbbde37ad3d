"""`success: fd <= 1.5`: what may be asked for, and when it is met."""

from __future__ import annotations

import pytest

from fewstep.config import RecipeError
from fewstep.eval.protocol.preset import METRICS
from fewstep.recipe.store import load
from fewstep.recipe.success import MEASURED, parse

TABLE = {
    "FD (house-digits)": {"value": 1.5},
    "KID (house-digits, cubic, unbiased)": {"value": 0.002},
    "class accuracy (house-digits)": {"value": 0.98},
    "recall (house-digits, k=5)": {"value": None},
}


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("fd <= 1.5", True),
        ("fd<=1.49", False),
        ("fd >= 1.5", True),
        ("kid <= 2e-3", True),
        ("class accuracy >= 0.985", False),
        ("  class accuracy >= .98 ", True),
    ],
)
def test_bounds_are_read_and_judged(text: str, met: bool):
    asked = parse(text)
    value = asked.value(TABLE)
    assert value is not None
    assert asked.met(value) is met
    assert parse(str(asked)) == asked


def test_what_was_not_measured_has_no_value():
    assert parse("energy <= 3").value(TABLE) is None
    assert parse("recall >= 0.5").value(TABLE) is None


def test_every_metric_but_the_score_of_prompts_can_be_asked_for():
    assert {m for m in METRICS if not any(m.startswith(own) for own in MEASURED.values())} == {"clip-score"}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("fd < 1.5", "expected METRIC <= NUMBER or METRIC >= NUMBER, such as fd <= 1.5, not 'fd < 1.5'"),
        ("fd", "expected METRIC <= NUMBER"),
        ("fid <= 2", "'fid' is not one of fd, kid"),
        ("fd <= low", "'low' is no number"),
        ("fd <= nan", "'nan' is no number"),
    ],
)
def test_others_are_refused_with_the_key(text: str, error: str):
    with pytest.raises(RecipeError, match="success: ") as caught:
        load("toy/dmd2", [f"success={text}"])
    assert error in str(caught.value)


def test_a_bound_needs_a_measurement():
    with pytest.raises(RecipeError, match="success: energy <= 9 needs a measurement, and evaluate is null"):
        load("toy/dmd2", ["success=energy <= 9", "evaluate=null"])
    assert load("toy/dmd2", ["success=energy <= 9"]).success == "energy <= 9"
