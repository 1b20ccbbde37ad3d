"""What an export says of itself is read back as it was written, or named where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.algebra.sampling import Sampler
from fewstep.config import UserError
from fewstep.train.note import NAME, Note, read_note


def test_a_note_comes_back(tmp_path: Path):
    assert read_note(tmp_path) == Note()
    for note in (
        Note(classes=10),
        Note(
            classes=0,
            size=(8, 12),
            sampler=Sampler(kind="gamma", steps=(1.0, 0.5), eta=0.4),
            call={"timesteps": [999, 499], "eta": 0.4},
            settings={"guidance_scale": 1.0},
        ),
    ):
        (tmp_path / NAME).write_text(note.text())
        assert read_note(tmp_path) == note


BAD: list[tuple[Any, str]] = [
    ({"classes": "ten"}, 'classes is "ten", not a number of classes'),
    ({"classes": True}, "classes is true, not a number of classes"),
    ({"size": ["a"]}, 'size is ["a"], not a height and a width'),
    ({"steps": "abc", "call": {"timesteps": [1]}}, 'steps is "abc"; expected decreasing levels in [0, 1]'),
    ({"steps": [-1.0], "call": {"timesteps": [1]}}, "steps is [-1.0]; expected decreasing levels"),
    ({"steps": [0.5, 0.5], "call": {"timesteps": [1]}}, "steps is [0.5, 0.5]; expected decreasing levels"),
    ({"steps": [1.0], "kind": "evil", "call": {"timesteps": [1]}}, "kind, eta or history is not one of a sampler"),
    ({"steps": [1.0]}, "call does not say at which levels the network is called"),
    ({"steps": [1.0], "call": {"eta": 0.3}}, "call does not say at which levels the network is called"),
    ({"steps": [1.0], "call": {"timesteps": [1]}, "settings": 3}, "settings is no JSON object"),
]


@pytest.mark.parametrize(("told", "said"), BAD)
def test_a_damaged_note_is_named(told: Any, said: str, tmp_path: Path):
    (tmp_path / NAME).write_text(json.dumps(told))
    with pytest.raises(UserError) as caught:
        read_note(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / NAME}: {said}")
    assert str(caught.value).endswith("; export the run again")
