"""`fewstep extract`: what a rank keeps, the file that diffusers fuses to the same weights, distances, and refusals."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import FAMILIES, make_pipeline

from fewstep.algebra.sampling import Sampler
from fewstep.cli import main
from fewstep.commands import extract as module
from fewstep.commands.extract import extract
from fewstep.commands.product import Product
from fewstep.config import UserError
from fewstep.networks.adapters import Adapted
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.lora_file import NAME
from fewstep.recipe.store import load

RUN = Path("runs/mine")


def product_of(folder: str, name: str | None, *settings: str) -> Product:
    """A whole student some way from its teacher, one rank two away in every linear layer."""
    shape = FAMILIES[name].shape if name else (1, 8, 8)
    net: Any = load_denoiser(folder, size=shape[1:], classes=None if name else 10)
    torch.manual_seed(3)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, torch.nn.Linear):
                m.weight += 0.02 * torch.randn(m.out_features, 2) @ torch.randn(2, m.in_features)
    recipe = load("digits-dmd2", [f"teacher.path={folder}", "method.steps=[1.0,0.5]", *settings])
    sampler = Sampler(kind="renoise", steps=(1.0, 0.5))
    return Product(net, sampler, shape, int(net.net.classes), "mine", (2,), recipe, 7)


def opened(monkeypatch: pytest.MonkeyPatch, product: Product) -> Product:
    monkeypatch.setattr(module, "open_product", lambda run: product)
    return product


def test_a_student_of_a_pipeline_becomes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened(monkeypatch, product_of(str(make_pipeline(tmp_path / "sd3", "sd3")), "sd3"))
    lines = list(extract(RUN, 2, tmp_path / "lora", "comfyui"))
    assert lines[0].startswith("rank 2: keeps 100.0 % of the squared difference of ")
    assert lines[0].endswith(" 100.0 % of that of all weights")
    assert lines[1] == f"adapter in {tmp_path / 'lora'}; load it with"
    assert (tmp_path / "lora" / NAME).is_file()
    assert json.loads((tmp_path / "lora" / "workflow.json").read_text())["10"]["class_type"] == "ManualSigmas"
    card = (tmp_path / "lora" / "README.md").read_text()
    assert (
        "| extracted from a student that was trained whole | rank 2 keeps 100.0 % of the squared difference of " in card
    )
    kept = json.loads((tmp_path / "lora" / "fewstep.json").read_text())["extracted"]
    assert kept == {"rank": 2, "kept_of_layers": pytest.approx(1, abs=1e-4), "kept_of_all": pytest.approx(1, abs=1e-4)}
    with pytest.raises(UserError, match=f"{tmp_path / 'lora'}: exists; overwrite it with --force"):
        list(extract(RUN, 2, tmp_path / "lora"))
    assert (tmp_path / "lora" / "workflow.json").is_file()

    def evaluate(self: Product) -> None:
        raise UserError("evaluate: is null")

    monkeypatch.setattr(Product, "evaluate", evaluate)
    told = list(extract(RUN, 2, tmp_path / "lora", measure=True, force=True))
    assert told[-1] == "not measured: evaluate: is null"  # the file is there by then
    assert not (tmp_path / "lora" / "workflow.json").exists()
    fewer = float(next(extract(RUN, 1)).split("keeps ")[1].split(" %")[0])
    assert 50 <= fewer < 100


def test_a_student_of_pixels_is_measured_and_gets_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = ("evaluate={metric: fd, features: house, samples: 20}",)
    opened(monkeypatch, product_of("assets:digits-teacher", None, *settings))
    lines = list(extract(RUN, 2, measure=True))
    told = lines[1].partition(": ")
    assert told[0].endswith(", 20 samples")
    student, its = (float(part.split()[0]) for part in told[2].split(", "))
    assert its == pytest.approx(student, rel=0.02)  # rank 2 is all there is
    with pytest.raises(UserError, match="runs/mine: no file: diffusers loads no LoRA file into a UNet2DModel"):
        list(extract(RUN, 2, tmp_path / "lora"))


def test_what_is_no_whole_student_is_refused(monkeypatch: pytest.MonkeyPatch):
    whole = opened(monkeypatch, product_of("assets:digits-teacher", None))
    with pytest.raises(UserError, match="--rank 0: must be at least 1"):
        list(extract(RUN, 0))
    adapted = replace(whole, net=Adapted(copy.deepcopy(whole.net), "a", rank=1))
    opened(monkeypatch, adapted)
    with pytest.raises(UserError, match="adapter already; write it with `fewstep export runs/mine --lora`"):
        list(extract(RUN, 2))
    told = copy.deepcopy(whole.net)
    told.add_inputs(("s",))  # type: ignore[operator]
    opened(monkeypatch, replace(whole, net=told))
    with pytest.raises(UserError, match="its student is told s beside the time"):
        list(extract(RUN, 2))
    opened(monkeypatch, replace(whole, recipe=None))
    with pytest.raises(UserError, match="has no teacher whose weights"):
        list(extract(RUN, 2))


def test_the_command_refuses_another_layout(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["extract", "runs/mine", "--format", "peft"])
    assert left.value.code == 2
    assert "--format 'peft': is not one of diffusers, kohya, comfyui" in capsys.readouterr().err
