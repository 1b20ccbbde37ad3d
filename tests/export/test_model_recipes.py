"""The recipes of recipes/models, on tiny folders of the same classes: they check, train, and export both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_new import stand_in_for_text
from tiny_pipelines import FAMILIES, make_pipeline

from fewstep.commands.check_recipe import check
from fewstep.commands.export import export_run
from fewstep.export.base import PARITY
from fewstep.networks.adapters import lora_layers
from fewstep.networks.diffusers import load_denoiser
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load
from fewstep.train.assisted import assisted
from fewstep.train.product import open_product
from fewstep.train.trainer import Trainer

MODELS = {
    "models/flux-dmd2-4step-lora": "flux",
    "models/sd3-dmd2-4step-lora": "sd3",
    "models/sd15-pg-sb-nasa": "sd15",
}


def test_each_has_its_test():
    assert set(MODELS) == {name for name in shipped() if name.startswith("models/")}


@pytest.mark.parametrize(("recipe", "name"), MODELS.items())
def test_it_trains_and_exports_as_a_pipeline_and_as_an_adapter(
    recipe: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    family, folder = FAMILIES[name], make_pipeline(tmp_path / name, name)
    stand_in_for_text(monkeypatch, load_denoiser(str(folder), size=family.shape[1:]).net)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\ntwo green dots\n")
    own = [f"data.path={prompts}", f"data.shape={list(family.shape)}", f"data.vae={folder}", f"teacher.path={folder}"]
    small = ["train.precision=fp32", "train.steps=2", "train.batch=2", "train.accumulate=1", "train.sample_every=0"]
    settings = [*own, f"data.encoder.path={folder}", *small]
    spec = load(recipe).evaluate
    if spec is not None:
        (tmp_path / "pictures").mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "a.png")
        settings += [f"evaluate.against={tmp_path / 'pictures'}"]
    lines, missing = check(recipe, settings)
    told = "\n".join(lines)
    assert missing == []
    assert "agree (sigma / alpha" in told
    assert "will not export" not in told
    run = tmp_path / "run"
    trainer = Trainer(load(recipe, settings), run, cpu=True)
    trainer.fit()
    assert set(load(recipe).student.targets) == {  # every layer that it names is there
        target for target in load(recipe).student.targets
        for layer, _ in trainer.roles.teacher.named_modules() if layer.endswith(f".{target}")
    }  # fmt: skip
    assert len(lora_layers(trainer.roles.teacher)) > 0
    done = export_run(run, tmp_path / "out", force=False)
    assert 0 < done.parity <= PARITY
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == family.pipeline
    adapter = export_run(run, tmp_path / "lora", force=False, lora=True)
    assert "load_lora_weights" in adapter.usage
    if spec is not None and spec.assist is not None:
        product = open_product(run)
        helped = assisted(product, spec.assist, trainer.roles.teacher, lambda cond: cond)
        index = torch.arange(2)
        moved = (helped.images(index, product.labels(2), 1) - product.images(index, product.labels(2), 1)).abs().max()
        assert 1e-6 < float(moved) < 1
