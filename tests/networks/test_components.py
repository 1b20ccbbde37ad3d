"""A pipeline's other parts are looked at before anything trains for them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import unet_condition, vae
from tiny_text import run_command, text_pipeline

from fewstep.commands.check_teacher import check_teacher
from fewstep.commands.run import run_recipe
from fewstep.config import UserError
from fewstep.networks.components import examine
from fewstep.networks.weights import NotFinite


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


def test_a_run_that_decodes_by_a_broken_vae_does_not_start(base: Path, tmp_path: Path):
    file = weights(base, "vae")
    held = load_file(file)
    name = next(k for k in held if k.startswith("decoder."))
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red apple\n")
    encoder = f"encoder: {{name: pipeline, path: '{base}'}}, vae: '{base}'"
    (tmp_path / "mine.yaml").write_text(
        f"about: a case\ndata: {{name: prompts, path: '{prompts}', shape: [4, 8, 8], {encoder}}}\n"
        f"teacher: {{name: diffusers, path: '{base}'}}\nstudent: {{name: copy, of: teacher}}\n"
        "critic: {name: copy, of: teacher}\nmethod: {name: dmd2, gan: null}\noptim: {default: {lr: 1e-4}}\n"
        "train: {steps: 1, batch: 1}\nevaluate: null\n"
    )
    try:
        save_file(held | {name: held[name].clone().fill_(torch.nan)}, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"vae {re.escape(str(base))}: .* NaN or infinity in {name}"):
            run_recipe(str(tmp_path / "mine.yaml"), [], tmp_path / "run", resume=False, force=False)
        assert not (tmp_path / "run").exists()
    finally:
        save_file(held, file, metadata={"format": "pt"})


def test_what_is_not_loaded_is_not_looked_at(base: Path, tmp_path: Path):
    """A variant beside plain weights, and a name that holds what a wrapper's would."""
    sub = tmp_path / "vae"
    shutil.copytree(base / "vae", sub)
    held = load_file(sub / weights(base, "vae").name)
    save_file({k: v * torch.nan for k, v in held.items()}, sub / "diffusion_pytorch_model.fp16.safetensors")
    assert examine(sub, "vae V") == len(held)
    save_file({f"module.{k}": v for k, v in held.items()} | {"last": torch.ones(1)}, sub / weights(base, "vae").name)
    assert examine(sub, "vae V") == len(held) + 1
