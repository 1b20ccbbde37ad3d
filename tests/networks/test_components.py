"""A pipeline's other parts are looked at before anything trains for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import unet_condition, vae
from tiny_text import run_command, text_pipeline

from fewstep.commands.check_roles import look
from fewstep.commands.check_teacher import check_teacher
from fewstep.config import RecipeError, UserError
from fewstep.networks.components import examine
from fewstep.networks.weights import NotFinite
from fewstep.recipe.store import load


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "T"
    return text_pipeline(folder, ["a red apple"], unet=unet_condition(), vae=vae(4, scaling_factor=0.18215))


def weights(base: Path, part: str) -> Path:
    return next((base / part).glob("*.safetensors"))


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_part_that_is_not_finite_is_named_with_its_tensor(base: Path, part: str):
    file = weights(base, part)
    held = load_file(file)
    assert examine(base / part, "teacher T") == len(held)
    name = sorted(held)[-1]
    try:
        save_file(held | {name: held[name].clone().fill_(torch.inf)}, file, metadata={"format": "pt"})
        with pytest.raises(
            NotFinite, match=re.escape(f"teacher T: the weights in {part}/ hold NaN or infinity in {name} (")
        ):
            examine(base / part, "teacher T")
        report = check_teacher(str(base))
        assert not report.ok
        assert f"cannot be distilled: teacher {base}: the weights in {part}/ hold NaN" in report.verdict()
    finally:
        save_file(held, file, metadata={"format": "pt"})


def test_a_part_within_a_wrapper_is_named_with_the_command_that_mends_it(base: Path):
    file = weights(base, "vae")
    held = load_file(file)
    try:
        save_file({f"_orig_mod.{k}": v for k, v in held.items()}, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"weights in vae/ are named as inside a wrapper, with '_orig_mod\.'") as told:
            examine(base / "vae", "vae V")
        run_command(str(told.value))
        assert load_file(file).keys() == held.keys()
    finally:
        save_file(held, file, metadata={"format": "pt"})


def test_a_run_that_decodes_by_a_broken_vae_does_not_start(base: Path):
    file = weights(base, "vae")
    held = load_file(file)
    name = next(k for k in held if k.startswith("decoder."))
    recipe = load("paper/lcm-sd15", [f"data.vae={base}"])
    try:
        save_file(held | {name: held[name].clone().fill_(torch.nan)}, file, metadata={"format": "pt"})
        with pytest.raises(RecipeError, match=rf"data.vae: vae {re.escape(str(base))}: .* NaN or infinity in {name}"):
            look(recipe)
    finally:
        save_file(held, file, metadata={"format": "pt"})
