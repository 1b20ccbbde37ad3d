"""Students made from a picture as IFSuperResolutionPipeline: the folder draws what fewstep's own sampler draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from snippets import check_call
from tiny_pipelines import make_pipeline
from tiny_students import controlled_product

from fewstep.algebra.sampling import Sampler
from fewstep.commands.check_student import check_student
from fewstep.config import UserError
from fewstep.export.base import ExportRefused, Stock, write_checked
from fewstep.export.choose import parts_of
from fewstep.export.lora import export_lora
from fewstep.export.picture import check_picture, whole_model
from fewstep.networks.adapters import Adapted, frozen
from fewstep.networks.diffusers import load_denoiser
from fewstep.recipe.store import load
from fewstep.train.build import build_roles
from fewstep.train.product import open_product, product_of

DATA = {"name": "degraded", "of": {"name": "digits"}, "by": {"name": "pool", "factor": 2}, "keep": False}


def recipe(folder: Path, **parts: Any) -> Any:
    told = {"about": "x", "data": DATA, "optim": {"default": {"lr": 1e-3}}, **parts}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(told))
    return load(str(file))


def lively(net: Any, scale: float = 0.15) -> Any:
    generator = torch.Generator().manual_seed(3)
    for p in net.parameters():
        p.data = scale * torch.randn(p.shape, generator=generator)
    return net.eval()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of random weights as a run writes it."""
    folder = tmp_path_factory.mktemp("teacher")
    student = {"name": "unet-text", "text": 4, "channels": [8, 8], "groups": 4, "image": 1}
    told = recipe(folder, student=student, method={"name": "denoise", "drop_cond": 0.0})
    data = told.data.open()
    net = lively(build_roles(told, data).student)
    done = write_checked(parts_of(product_of(told, net, data, "teacher")), folder / "rounded")
    assert 1e-5 < done.parity < 5e-3  # teachers are written in float16
    for p in net.parameters():
        p.data = p.data.half().float()
    done = write_checked(parts_of(product_of(told, net, data, "teacher")), folder / "export")
    assert done.parity < 1e-6
    next(net.parameters()).data.flatten()[0] = 1e5
    with pytest.raises(UserError, match=r"float16, in which teachers are written, cannot hold .*: it ends at 65504"):
        write_checked(parts_of(product_of(told, net, data, "teacher")), folder / "large")
    assert not (folder / "large").exists()
    return folder / "export"


def student_of(teacher: Path, folder: Path, steps: list[float], **more: Any) -> Any:
    told = recipe(
        folder,
        teacher={"name": "diffusers", "path": str(teacher)},
        student={"name": "copy", "of": "teacher"},
        critic={"name": "copy", "of": "teacher"},
        method={"name": "dmd2", "gan": None, "steps": steps, **more},
    )
    data = told.data.open()
    net: Any = build_roles(told, data).student
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02)
    return product_of(told, net, data, "student")


def test_a_teacher_is_opened_again_as_it_was_written(teacher: Path):
    weights = load_file(teacher / "unet" / "diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    index = json.loads((teacher / "model_index.json").read_text())
    config = json.loads((teacher / "unet" / "config.json").read_text())
    assert index["_class_name"] == "IFSuperResolutionPipeline"
    assert (config["in_channels"], config["out_channels"]) == (2, 1)
    net: Any = load_denoiser(teacher)
    assert (net.image_channels, net.net.channels()) == (1, 1)


@pytest.mark.parametrize("steps", [[1.0], [1.0, 0.75, 0.5, 0.25]], ids=["ddim", "lcm"])
def test_the_stock_pipeline_draws_what_the_sampler_draws(teacher: Path, tmp_path: Path, steps: list[float]):
    done = write_checked(parts_of(student_of(teacher, tmp_path, steps)), tmp_path / "export")
    assert done.parity < 1e-6
    checked = check_student(str(tmp_path / "export"))
    assert checked.ok, checked.text()
    assert checked.calls == len(steps)
    code = done.usage.replace('"sample.png"', repr(str(tmp_path / "sample.png")))
    assert "IFSuperResolutionPipeline" in code
    exec(code, {})
    assert (tmp_path / "sample.png").is_file()
    with pytest.raises(Exception, match="makes samples from a picture"):
        open_product(tmp_path / "export")


def test_a_network_is_copied_for_a_picture_alone(teacher: Path):
    """The copy is one more network in memory."""
    net: Any = load_denoiser(teacher).net
    whole: Any = whole_model(net)
    assert (whole.conv_in.in_channels, net.model.conv_in.in_channels) == (2, 1)

    class Plain:
        picture, model = None, torch.nn.Identity()

    assert whole_model(Plain) is Plain.model


def test_an_adapter_says_how_it_is_given_its_picture(teacher: Path, tmp_path: Path):
    product = student_of(teacher, tmp_path, [1.0, 0.5])
    adapted = Adapted(frozen(load_denoiser(teacher)), "student", rank=2, targets=["to_q", "conv1"])
    done = export_lora(replace(product, net=adapted), tmp_path / "lora")
    lines = done.usage.splitlines()
    assert lines[1] == "from diffusers import IFSuperResolutionPipeline, LCMScheduler"
    assert lines[3] == f'pipe.load_lora_weights("{tmp_path / "lora"}")'
    assert "image=image, " in lines[-1]
    exec(done.usage.replace('"sample.png"', repr(str(tmp_path / "sample.png"))), {})
    assert (tmp_path / "sample.png").is_file()


def test_what_no_stock_pipeline_does_is_refused():
    class Other:
        image_channels, pipeline, model = 1, "ConsistencyModelPipeline", torch.nn.Identity()

    class Wide:
        image_channels, pipeline, model = 3, "IFSuperResolutionPipeline", torch.nn.Identity()

        def channels(self) -> int:
            return 1

    class Fits(Wide):
        image_channels = 1

    ddim, euler = Stock("DDIMScheduler", {}, {}, None), Stock("EulerDiscreteScheduler", {}, {}, None)  # type: ignore[arg-type]
    with pytest.raises(ExportRefused, match="no stock pipeline joins a picture to the input of a Identity; train"):
        check_picture(Other(), ddim)
    with pytest.raises(ExportRefused, match="as many channels as samples have, 1, and this student was trained with 3"):
        check_picture(Wide(), ddim)
    with pytest.raises(ExportRefused, match="EulerDiscreteScheduler scales the picture"):
        check_picture(Fits(), euler)
    check_picture(Fits(), ddim)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "sampler",
    [Sampler(steps=(1.0, 0.75, 0.5, 0.25)), Sampler(kind="map", steps=(1.0, 0.7, 0.312))],
    ids=["lcm", "euler"],
)
def test_a_controlnet_is_written_beside_the_unet_of_its_teacher(tmp_path: Path, name: str, sampler: Sampler):
    folder = make_pipeline(tmp_path / "teacher", name)
    product = controlled_product(folder, name, sampler)
    done = write_checked(parts_of(product), tmp_path / "export")
    assert done.parity < 5e-6, done.parity
    index = json.loads((tmp_path / "export" / "model_index.json").read_text())
    assert index["_class_name"] == f"StableDiffusion{'XL' * (name == 'sdxl')}ControlNetPipeline"
    assert index["controlnet"] == ["diffusers", "ControlNetModel"]
    own = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    written = load_file(tmp_path / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(v, own[k]) for k, v in written.items())
    check_call(done.usage)
    checked = check_student(str(tmp_path / "export"))
    assert checked.ok, checked.text()
    if name == "sd15":
        half = write_checked(parts_of(product, "fp16"), tmp_path / "half")
        assert half.parity < 5e-6


def test_a_controlnet_of_another_size_than_its_unet(tmp_path: Path):
    """Its example has the picture of the UNet's own sample_size, (8, 12); the export is called at the student's."""
    folder = make_pipeline(tmp_path / "teacher", "sd15")
    product = controlled_product(folder, "sd15", Sampler(steps=(1.0, 0.5)), size=(12, 8))
    done = write_checked(parts_of(product), tmp_path / "export")
    assert done.parity < 5e-6, done.parity
    assert "resize((16, 24))" in done.usage
    assert "height=24, width=16" in done.usage
    checked = check_student(str(tmp_path / "export"))
    assert checked.ok, checked.text()
    assert 'pipeline_tag: "image-to-image"' in (tmp_path / "export" / "README.md").read_text().split("---")[1]
    with pytest.raises(UserError, match="draw from it with diffusers' StableDiffusionControlNetPipeline, as its card"):
        open_product(tmp_path / "export")
