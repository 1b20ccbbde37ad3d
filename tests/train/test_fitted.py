"""fitted.json: what is written is read back, and what is damaged is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_teacher import edit_json

from fewstep.algebra.sampling import Sampler
from fewstep.config import UserError
from fewstep.train.fitted import NAME, Fitted, is_fit, read_fit

FIT = Fitted(
    of="folder",
    source="assets:digits-teacher",
    digest="3 files",
    guidance=1.5,
    solver="ddim",
    points=8,
    noises=4,
    seed=7,
    samplers=(
        Sampler(kind="map", steps=(1.0, 0.5), history=(0.0, 0.25)),
        Sampler(kind="map", steps=(1.0, 0.5, 0.375)),
    ),
    calls=321,
    seconds=1.25,
    rows=({"calls": 2, "name": "even DDIM", "metric": "fd", "value": 3.0, "error": None, "samples": 9},),
)


def written(folder: Path) -> Path:
    (folder / NAME).write_text(FIT.text())
    return folder


def test_what_is_written_is_read_back(tmp_path: Path):
    assert not is_fit(tmp_path)
    assert read_fit(written(tmp_path)) == FIT
    assert is_fit(tmp_path)
    assert FIT.counts == (2, 3)
    assert FIT.at(3).history == ()
    with pytest.raises(UserError, match=r"--steps 4: was fitted for 2, 3 calls; fit others with `fewstep fit --calls 4`"):
        FIT.at(4)


def test_it_holds_at_its_own_guidance_alone():
    FIT.check_guidance(None, "--guidance")
    FIT.check_guidance(1.5, "--guidance")
    with pytest.raises(UserError, match=r"--guidance 3: this sampler was fitted at guidance 1\.5 and holds there only"):
        FIT.check_guidance(3.0, "--guidance")
    with pytest.raises(UserError, match="guidance 1 and"):
        replace(FIT, guidance=1.0).check_guidance(1.5, "--guidance")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "format is not 1"),
        ({"guidance": "much"}, 'guidance is "much", not as fewstep writes it'),
        ({"points": True}, "points is true"),
        ({"of": "elsewhere"}, "names no teacher or no sampler"),
        ({"samplers": []}, "names no teacher or no sampler"),
        ({"samplers": [{"steps": [0.5, 1.0], "history": []}]}, r"steps is \[0\.5, 1\.0\]; expected decreasing"),
        (
            {"samplers": [{"steps": [1.0, 0.5], "history": [0, 1, 2]}]},
            r"history is \[0, 1, 2\]; expected one weight a step",
        ),
        ({"samplers": [{"steps": "all"}]}, 'steps is "all"'),
        ({"samplers": [3]}, "steps is null"),
    ],
)
def test_a_damaged_file_is_named_with_its_key(tmp_path: Path, changes: dict[str, Any], words: str):
    edit_json(written(tmp_path) / NAME, **changes)
    with pytest.raises(UserError, match=rf"fitted\.json: .*{words}.*fit it again"):
        read_fit(tmp_path)


def test_a_file_that_is_no_json_is_named(tmp_path: Path):
    (tmp_path / NAME).write_text("{")
    with pytest.raises(UserError, match=r"fitted\.json"):
        read_fit(tmp_path)
    (tmp_path / NAME).write_text(json.dumps([1]))
    with pytest.raises(UserError, match="expected a JSON object"):
        read_fit(tmp_path)
