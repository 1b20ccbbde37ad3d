"""A recipe with comments is the same recipe."""

from __future__ import annotations

import pytest

from fewstep.config import parse
from fewstep.recipe.annotate import WIDTH, annotated
from fewstep.recipe.fields import doc_of
from fewstep.recipe.store import dump, load
from fewstep.recipe.training import Train

NAMED = ("optim", "roles", "copy", "expected")
"""Keys whose own keys are names: of roles, of readings."""


@pytest.mark.parametrize("name", ["digits-dmd2", "toy/joint", "paper/sana-sprint", "paper/phased-dmd-flow"])
def test_comments_change_no_value_and_stand_at_every_key(name: str):
    plain = dump(load(name))
    text = annotated(plain)
    assert parse(text, "with").data == parse(plain, "without").data
    for path, (_, line) in parse(text, "with").lines.items():
        rows = text.splitlines()
        if path and isinstance(path[-1], str) and path[0] not in NAMED and len(path) < 4:
            beside = " # " in rows[line - 1]
            assert beside or rows[line - 2].lstrip().startswith("#"), path


def test_a_comment_is_the_docstring():
    rows = annotated(dump(load("toy/dmd2"))).splitlines()
    assert f"  keep: 2  # {doc_of(Train, 'keep')}" in rows
    at = next(i for i, row in enumerate(rows) if row.startswith("  accumulate:"))
    assert rows[at - 1] == f"  # {doc_of(Train, 'accumulate')}"
    assert max(len(row) for row in rows if "#" in row) <= WIDTH


def test_a_text_over_several_lines_keeps_its_comment_above():
    plain = dump(load("toy/dmd2", ["about=" + "word " * 40]))
    assert parse(annotated(plain), "with").data["about"] == parse(plain, "without").data["about"]
