"""An exported folder is called as its own note says, in levels, guidance and size; others as diffusers calls them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewstep.algebra.sampling import Sampler
from fewstep.commands.sample_text import draw_prompts
from fewstep.commands.sources import called
from fewstep.config import UserError
from fewstep.networks.controlnet import CONTROLNET_PIPELINES
from fewstep.train.note import NAME, Note


def test_levels_and_settings_of_a_student(tmp_path: Path):
    note = Note(
        sampler=Sampler(kind="gamma", steps=(1.0, 0.7, 0.3), eta=0.3),
        call={"timesteps": [999, 699, 299], "eta": 0.3},
        settings={"guidance_scale": 1.0, "height": 16, "width": 24},
    )
    (tmp_path / NAME).write_text(note.text())
    size = {"guidance_scale": 1.0, "height": 16, "width": 24}
    own = (3, {**size, "timesteps": [999, 699, 299], "eta": 0.3})
    assert called(tmp_path, None, False) == own
    assert called(tmp_path, 3, False) == own
    with pytest.raises(UserError, match=r"^--steps 4: this student was trained for 3; add --any to try it anyway$"):
        called(tmp_path, 4, False)
    assert called(tmp_path, 4, True) == (4, {**size, "eta": 0.3, "num_inference_steps": 4})


def test_folders_of_others_take_the_steps_asked_for(tmp_path: Path):
    for text in (None, Note(classes=10).text()):
        if text:
            (tmp_path / NAME).write_text(text)
        assert called(tmp_path, 7, False) == (7, {"num_inference_steps": 7})
        with pytest.raises(UserError, match="does not say how many steps it takes; give --steps"):
            called(tmp_path, None, False)


def test_a_folder_that_takes_a_picture_is_refused_by_its_pipeline(tmp_path: Path):
    for kind in CONTROLNET_PIPELINES:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        said = f"makes samples from a picture; draw from it with diffusers' {kind}, as its card shows"
        with pytest.raises(UserError, match=said):
            called(tmp_path, 2, False)
        with pytest.raises(UserError, match=said):
            draw_prompts(tmp_path, ["a fox"], tmp_path / "sheet.png")


class Pipe:
    """A pipeline that records how it is called."""

    unet = None

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *, prompt: Any = None, generator: Any = None, output_type: str = "pil", **more: Any) -> Any:
        import numpy as np

        self.calls.append(more)
        return type("Out", (), {"images": np.zeros((len(generator), 4, 4, 3))})


def test_a_pipeline_gets_these_arguments_and_those_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from fewstep.commands import sources
    from fewstep.eval.protocol.preset import load_preset

    note = Note(sampler=Sampler(steps=(0.9,)), call={"timesteps": [899]}, settings={"guidance_scale": 1.0})
    (tmp_path / NAME).write_text(note.text())
    pipe = Pipe()
    monkeypatch.setattr(sources, "load_pipeline", lambda path, device: pipe)
    preset = load_preset("digits")

    def calls(*given: str) -> dict[str, Any]:
        models = sources.of_pipeline(
            preset, tmp_path, steps=(), call=given, prompts=None, device=torch.device("cpu"), check=lambda shape: None
        )
        assert [m.steps for m in models] == [1]
        return {k: v for k, v in pipe.calls[-1].items() if k != "class_labels"}

    assert calls() == {"timesteps": [899], "guidance_scale": 1.0}
    assert calls("guidance_scale=2.0") == {"timesteps": [899], "guidance_scale": 2.0}


def test_samples_are_measured_through_a_recipes_views():
    import torch

    from fewstep.algebra.views import Mirror, Negative
    from fewstep.commands.sources import of_product
    from fewstep.eval.protocol.preset import load_preset
    from fewstep.recipe.store import load
    from fewstep.train.product import open_product

    product = replace(open_product(Path(__file__).parents[2] / "assets" / "digits-teacher"), sampler=Sampler())
    seen = load("digits-kd", ["evaluate={metric: fd-house-digits, views: [{name: mirror}, {name: negative}]}"])
    assert seen.evaluate is not None
    assert seen.evaluate.views == (Mirror(), Negative())
    preset = load_preset("fd-house-digits")
    plain, viewed = (of_product(preset, replace(product, recipe=r), "x") for r in (None, seen))
    indices = [0, 5, 7]
    torch.testing.assert_close(viewed.generate(0)(indices), -plain.generate(0)(indices).flip(-1))
    assert viewed.digest() != plain.digest()


def test_views_that_the_samples_do_not_have_are_refused_before_training():
    from torch import nn

    from fewstep.commands.judge import judge_of
    from fewstep.config import UserError
    from fewstep.recipe.store import load
    from fewstep.train.product import product_of

    for view, words in (("{name: frame}", "needs videos"), ("{name: coarse, factor: 3}", "sides 3 divides")):
        recipe = load("digits-kd", [f"evaluate={{metric: fd-house-digits, views: [{view}]}}"])
        assert recipe.evaluate is not None
        product = product_of(recipe, nn.Identity(), recipe.data.open(), "x")
        with pytest.raises(UserError, match=f"views: view [a-z]+: .*{words}"):
            judge_of(product, recipe.evaluate)
