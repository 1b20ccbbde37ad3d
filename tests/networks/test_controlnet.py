"""A ControlNet beside a frozen UNet: without effect at first, alone trained and saved, the UNet shared and untouched."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_condition import condition_unet
from tiny_pictures import noise
from tiny_pipelines import make_pipeline, unet_condition, vae
from tiny_text import text_pipeline

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.process import DiscreteVP
from fewstep.algebra.sampling import Sampler
from fewstep.commands.check_recipe import check
from fewstep.commands.product import Product
from fewstep.config import RecipeError
from fewstep.export.choose import export
from fewstep.methods.consistency import Consistency
from fewstep.networks.adapters import enable_checkpointing, frozen, on_cpu, own_parameters, own_state, twin
from fewstep.networks.controlnet import ControlNetSpec
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.parts import Site
from fewstep.networks.roles import Roles
from fewstep.networks.specs import DiscriminatorSpec
from fewstep.networks.wrappers.unet_condition import UNetCondition
from fewstep.recipe.store import load
from fewstep.train.product import open_product
from fewstep.train.switches import compile_roles
from fewstep.train.trainer import Trainer

SHAPE, IMAGE = (4, 8, 12), (3, 16, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("sd15"), "sd15")


def site_of(teacher: Any, image: tuple[int, ...] | None = IMAGE) -> Site:
    return Site(SHAPE, 0, {"teacher": teacher}, 3, image)


@pytest.fixture
def teacher(folder: Path) -> Any:
    net: Any = frozen(load_denoiser(str(folder), size=SHAPE[1:]))
    net.ignore = ("image",)
    return net


def lively(net: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for p in own_parameters(net):
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return net


def inputs(net: Any, b: int = 2) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(b, *SHAPE, generator=generator), torch.tensor([700.0, 30.0], dtype=torch.float64)
    image = torch.rand(b, *IMAGE, generator=generator) * 2 - 1
    return x, t, {"text": torch.randn(b, 7, 12, generator=generator), "image": image}


def test_without_effect_at_first_then_with_one(teacher: Any):
    net: Any = ControlNetSpec().build(site_of(teacher))
    x, t, cond = inputs(net)
    assert torch.equal(net(x, t, cond).x0, teacher(x, t, cond).x0)
    lively(net)
    here = net(x, t, cond).x0
    assert not torch.equal(here, teacher(x, t, cond).x0)
    other = net(x, t, cond | {"image": cond["image"].flip(-1)}).x0
    assert float((here - other).abs().max()) > 1e-4


def test_the_controlnet_alone_is_its_own_and_a_copy_shares_the_unet(teacher: Any):
    net: Any = ControlNetSpec().build(site_of(teacher))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    assert {k.split(".")[1] for k in own_state(net)} == {"controlnet"}
    assert not {id(p) for p in own_parameters(net)} & {id(p) for p in teacher.parameters()}
    x, t, cond = inputs(net)
    net(x, t, cond).x0.square().mean().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in own_parameters(net))
    other: Any = twin(lively(net))
    assert other.net.model is teacher.net.model
    assert other.net.controlnet is not net.net.controlnet
    assert torch.equal(other(x, t, cond).x0, net(x, t, cond).x0)
    alone: Any = on_cpu(net)
    assert alone.net.model is not teacher.net.model
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert copy.deepcopy(net).net.pipeline == "StableDiffusionControlNetPipeline"


def test_it_trains_by_a_method_as_it_is(teacher: Any):
    net: Any = lively(ControlNetSpec().build(site_of(teacher)))
    x, _, cond = inputs(net)
    batch = Batch(Draws(fold("x"), torch.arange(2)), SHAPE, x0=x, cond=cond)
    method = Consistency(solver="ddim")
    loss = sum(next(iter(method.losses(Roles(teacher=teacher, student=net), batch, 0))).values())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in own_parameters(net))


def test_a_product_moves_with_the_unet_that_it_is_beside(teacher: Any):
    net: Any = ControlNetSpec().build(site_of(teacher))
    Product(net, Sampler(steps=(1.0,)), SHAPE, 0, "student", (1,)).to("meta")
    assert {p.device.type for p in (*net.parameters(), *net.net.model.parameters())} == {"meta"}


def test_a_discriminator_stands_on_a_trunk_that_is_told_text(teacher: Any):
    wide = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 34}
    sdxl = Denoiser(UNetCondition(unet_condition(**wide)), DiscreteVP(), "eps", "index")
    sdxl.ignore = ("image",)
    net: Any = ControlNetSpec().build(site_of(teacher))
    x, t, cond = inputs(net)
    pooled = {"pooled": torch.randn(2, 34 - 6 * 4)}
    for trunk, given in ((teacher, cond), (net, cond), (sdxl, cond | pooled)):
        site = replace(site_of(teacher), roles={"critic": trunk})
        heads: Any = DiscriminatorSpec(taps=("mid",)).build(site)
        assert heads(x, t, given).shape == (2, 1)


def test_recomputing_reaches_the_unet_and_changes_no_gradient(teacher: Any):
    def gradients(again: bool) -> list[torch.Tensor]:
        net: Any = lively(ControlNetSpec().build(site_of(teacher)))
        if again:
            assert enable_checkpointing(net)
        x, t, cond = inputs(net)
        net(x, t, cond).x0.square().mean().backward()
        return [p.grad for p in net.parameters()]

    plain = gradients(False)
    assert not teacher.net.model.is_gradient_checkpointing
    again = gradients(True)
    assert teacher.net.model.is_gradient_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_compiled_it_is_the_controlnet_and_not_its_teachers_unet(teacher: Any, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: seen.append(type(self).__name__))
    roles = Roles(teacher=teacher, student=ControlNetSpec().build(site_of(teacher)))
    for role in roles:
        compile_roles(roles, [role])
    assert seen == ["UNet2DConditionModel", "ControlNetModel"]


def test_the_recipe_of_the_documentation_is_one(tmp_path: Path):
    """It needs text beside the picture: without an encoder, or with `keep: false`, it is refused by its data."""
    text = (Path(__file__).parents[2] / "docs" / "pictures.md").read_text()
    (told,) = [b for b in re.findall(r"```yaml\n(.*?)```", text, re.S) if "controlnet" in b]
    rest = ("about: x", "critic: {name: controlnet, of: teacher}", "method: {name: dmd2, gan: null}")
    (tmp_path / "mine.yaml").write_text("\n".join([told, *rest, "optim: {default: {lr: 1e-3}}"]))
    assert load(str(tmp_path / "mine.yaml")).student.name == "controlnet"
    for setting, held in (
        ("data.of.encoder=null", "data.of is captions without an encoder"),
        ("data.keep=false", "keep: false drops it"),
    ):
        with pytest.raises(
            RecipeError, match=f"data: the student is a ControlNet beside a UNet that is told text.*{held}"
        ):
            load(str(tmp_path / "mine.yaml"), [setting])


def test_one_that_was_saved_is_where_it_begins(teacher: Any, tmp_path: Path):
    net: Any = lively(ControlNetSpec().build(site_of(teacher)))
    net.net.controlnet.save_pretrained(tmp_path / "canny")
    again: Any = ControlNetSpec(path=str(tmp_path / "canny")).build(site_of(teacher))
    x, t, cond = inputs(net)
    assert torch.equal(again(x, t, cond).x0, net(x, t, cond).x0)
    with pytest.raises(RecipeError, match="conditioning_channels is 3, and here it is 1; name one"):
        ControlNetSpec(path=str(tmp_path / "canny")).build(site_of(teacher, (1, 16, 24)))


def test_what_it_cannot_stand_beside_is_named(teacher: Any):
    for image, held in ((None, "hold no picture"), ((3, 8, 12), r"hold one of \[3, 8, 12\]")):
        with pytest.raises(
            RecipeError, match=f"takes pictures of 16 x 24 pixels, 2 for each cell of the latents.*{held}"
        ):
            ControlNetSpec().build(site_of(teacher, image))
    digits: Any = frozen(load_denoiser("assets:digits-teacher"))
    with pytest.raises(
        RecipeError, match=r"the teacher is a UNet2DModel, and a ControlNet is for a UNet2DConditionModel"
    ):
        ControlNetSpec().build(replace(site_of(digits), shape=(1, 8, 8)))
    lcm = Denoiser(UNetCondition(unet_condition(time_cond_proj_dim=8), pixels=2), DiscreteVP(), "eps", "index")
    with pytest.raises(RecipeError, match=r"the teacher takes its guidance scale as an input \(time_cond_proj_dim\)"):
        ControlNetSpec().build(site_of(lcm))
    net: Any = ControlNetSpec().build(site_of(teacher))
    x, t, cond = inputs(net)
    with pytest.raises(ValueError, match=r"takes cond\['image'\] of \[2, 3, 16, 24\], 2 pixels for each cell"):
        net(x, t, cond | {"image": cond["image"][..., :12]})
    for setting, said in (("train.offload=true", "train.offload: true"), ("train.parallel=fsdp", "train.parallel: fsdp")):
        with pytest.raises(RecipeError, match=f"{said}: the student calls another role's UNet"):
            load("digits-dmd2", ["student={name: controlnet, of: teacher}", setting])


def test_a_run_on_pictures_with_captions_goes_from_recipe_to_pipeline(tmp_path: Path):
    """DMD2 by a text teacher that never sees the edges; student and critic are ControlNets on its UNet."""
    words = ("a red square", "two green dots")
    text_pipeline(tmp_path / "sd", words, unet=condition_unet(), vae=vae(4, scaling_factor=0.18215))
    (tmp_path / "pictures").mkdir()
    for i, text in enumerate(words):
        Image.fromarray(noise(16, 16, 3, seed=i)).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(text)
    (tmp_path / "mine.yaml").write_text(
        f"""about: text
data:
  name: degraded
  of:
    name: captions
    path: {tmp_path}/pictures
    size: 16
    encoder: {{name: pipeline, path: {tmp_path}/sd}}
    text_cache: {tmp_path}/cache
  by: {{name: edges}}
  vae: {tmp_path}/sd
teacher: {{name: diffusers, path: {tmp_path}/sd, ignore: [image]}}
student: {{name: controlnet, of: teacher}}
critic: {{name: controlnet, of: teacher}}
method: {{name: dmd2, gan: null, critic: {{weight: eps, steps: 1}}, guidance: 3.0, steps: [1.0, 0.5]}}
optim: {{default: {{lr: 1e-2}}}}
train: {{steps: 2, batch: 2, ema: [0.5], sample_every: 0, checkpoint_every: 1}}
evaluate: null
"""
    )
    checked = check(str(tmp_path / "mine.yaml"), [])
    assert "training, evaluation and LCMScheduler agree" in checked[0][-1]
    recipe = load(str(tmp_path / "mine.yaml"))
    trainer = Trainer(recipe, tmp_path / "run", cpu=True)
    teacher = {k: v.clone() for k, v in trainer.roles.teacher.state_dict().items()}
    before = {k: v.clone() for k, v in own_state(trainer.roles.student).items()}
    trainer.fit()
    assert all(torch.equal(v, teacher[k]) for k, v in trainer.roles.teacher.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in own_state(trainer.roles.student).items())
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "ema_0.5.safetensors")
    assert {k.split(".")[1] for k in saved} == {"controlnet"}
    product = open_product(tmp_path / "run")
    done = export(product, tmp_path / "export")
    assert done.parity < 5e-6
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "export", safety_checker=None, requires_safety_checker=False)
    assert type(pipe).__name__ == "StableDiffusionControlNetPipeline"
    picture = pipe("two green dots", image=torch.rand(1, 1, 16, 16), num_inference_steps=2, guidance_scale=1.0)
    assert picture.images[0].size == (16, 16)
