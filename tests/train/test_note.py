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
    ({"steps": [1.0], "call": [1]}, "call is no JSON object"),
    ({"steps": [1.0], "call": {"timesteps": None}}, "call does not say at which levels"),
    ({"steps": [1.0], "call": {"timesteps": "999"}}, 'call.timesteps cannot be "999"'),
    ({"steps": [1.0], "call": {"timesteps": [[999]]}}, "call.timesteps cannot be [[999]]"),
    ({"steps": [1.0], "call": {"num_inference_steps": "1"}}, 'call.num_inference_steps cannot be "1"'),
    ({"steps": [1.0], "call": {"num_inference_steps": True}}, "call.num_inference_steps cannot be true"),
    ({"steps": [1.0], "call": {"num_inference_steps": 10**9}}, "call.num_inference_steps cannot be 1000000000"),
    ({"steps": [1.0], "call": {"num_inference_steps": 1, "eta": "x"}}, 'call.eta cannot be "x"'),
    ({"steps": [1.0], "call": {"num_inference_steps": 1, "output_type": "pil"}}, "call.output_type is no argument"),
    ({"steps": [1.0], "call": {"num_inference_steps": 1}, "settings": {"height": "8"}}, 'settings.height cannot be "8"'),
    ({"steps": [1.0], "call": {"num_inference_steps": 1}, "settings": {"prompt": "x"}}, "settings.prompt is no argument"),
    ({"steps": [1.0], "call": {"num_inference_steps": 2}}, "call.num_inference_steps is 2, but there are 1 steps"),
    ({"steps": [1.0, 0.5], "call": {"timesteps": [999]}}, "call.timesteps has 1 levels, but there are 2 steps"),
    ({"steps": [1.0, 0.5], "call": {"timesteps": [999, 499, 0]}}, "call.timesteps has 3 levels, but there are 2 steps"),
    ({"steps": [1.0, 0.5], "call": {"sigmas": [1.0, 0.4]}}, "call.sigmas stands at the levels [1.0, 0.4], steps at [1.0"),
]
TABLE = {"_class_name": "LCMScheduler", "num_train_timesteps": 1000}
KARRAS = {"_class_name": "CMStochasticIterativeScheduler", "num_train_timesteps": 11}
CALLS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (TABLE, {"timesteps": [999, 499]}, ""),
    (TABLE, {"num_inference_steps": None, "timesteps": [999, 499]}, ""),
    (TABLE, {"num_inference_steps": 2}, ""),
    (TABLE, {"timesteps": [999, 249]}, "call.timesteps stands at the levels [1.0, 0.25], steps at [1.0, 0.5]"),
    (KARRAS, {"timesteps": [5, 0]}, ""),
    (KARRAS, {"timesteps": [5, 1]}, "call.timesteps stands at the levels [0.9, 0.5], steps at [1.0, 0.5]"),
    ({"_class_name": "SCMScheduler"}, {"num_inference_steps": 2, "timesteps": [1.57, 1.1, 0.0]}, ""),
    ({}, {"sigmas": [1.0, 0.5]}, ""),
]


@pytest.mark.parametrize(("told", "said"), BAD)
def test_a_damaged_note_is_named(told: Any, said: str, tmp_path: Path):
    (tmp_path / NAME).write_text(json.dumps(told))
    with pytest.raises(UserError) as caught:
        read_note(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / NAME}: {said}")
    assert str(caught.value).endswith("; export the run again")


@pytest.mark.parametrize(("scheduler", "call", "said"), CALLS)
def test_a_call_visits_the_students_steps(scheduler: dict[str, Any], call: dict[str, Any], said: str, tmp_path: Path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (tmp_path / NAME).write_text(json.dumps({"steps": [1.0, 0.5], "call": call}))
    if not said:
        assert read_note(tmp_path).call == call
        return
    with pytest.raises(UserError) as caught:
        read_note(tmp_path)
    assert str(caught.value) == f"{tmp_path / NAME}: {said}; export the run again"
