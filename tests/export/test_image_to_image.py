"""Students that go on from a picture: the stock image-to-image pipeline draws what fewstep's own sampler draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import called as call_of
from PIL import Image
from snippets import check_call, run_snippet
from tiny_families import TODAY
from tiny_pipelines import built, make_pipeline
from tiny_students import make_product
from tiny_teacher import make_run, make_teacher

from fewstep.algebra.noising import add_noise
from fewstep.algebra.sampling import Sampler
from fewstep.commands import export as commands
from fewstep.commands.check_student import check_student
from fewstep.commands.sources import called
from fewstep.config import UserError
from fewstep.export.base import ExportRefused
from fewstep.export.choose import check_options, export, parts_of
from fewstep.export.image_to_image import PIPELINES, begun, draw_from, image_to_image_stock
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.routed import ByClass, Routed

FOUR = (1.0, 0.75, 0.5, 0.25)


def deepfloyd() -> Any:
    import diffusers as d

    unet = d.UNet2DConditionModel(
        sample_size=(8, 12), in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=4, cross_attention_dim=32, encoder_hid_dim=12,
        encoder_hid_dim_type="text_proj", addition_embed_type="text", addition_embed_type_num_heads=4,
    )  # fmt: skip
    scheduler = d.DDIMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction", clip_sample=False)
    scheduler.register_to_config(variance_type="learned")
    absent: Any = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    return d.IFPipeline(**absent, unet=unet, scheduler=scheduler, requires_safety_checker=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    made = {name: make_pipeline(root / name, name) for name in ("sd15", "sdxl", "sd3", "flux", "pixart")}
    built(deepfloyd).save_pretrained(root / "if")
    # Its image-to-image pipeline opens a UNet of one side alone.
    config = made["sd15"] / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 8}))
    built(TODAY["z_image"].build).save_pretrained(root / "z_image")
    return made | {"if": root / "if", "z_image": root / "z_image"}


def student(folder: Path, name: str, sampler: Sampler) -> Any:
    if name == "z_image":
        like = make_product(folder, "sd3", sampler)
        return replace(like, shape=TODAY[name].shape, net=load_denoiser(str(folder), size=TODAY[name].shape[1:]))
    if name != "if":
        return make_product(folder, name, sampler)
    # A student of the teacher's weights under a recipe of another family's name, whose folder and shape are its own.
    like = make_product(folder, "sd15", sampler)
    return replace(like, shape=(3, 8, 12), net=load_denoiser(str(folder), size=(8, 12)))


CASES = {
    "sd15 re-noises": ("sd15", Sampler(steps=FOUR), "LCMScheduler"),
    "sd15 by its own jumps": ("sd15", Sampler(kind="map", steps=(1.0, 0.7, 0.312)), "TCDScheduler"),
    "sd15 as TCD": ("sd15", Sampler(kind="gamma", steps=FOUR, eta=0.3), "TCDScheduler"),
    "sdxl once": ("sdxl", Sampler(steps=(0.75,)), "LCMScheduler"),
    "if re-noises": ("if", Sampler(steps=FOUR), "LCMScheduler"),
    "if by its own jumps": ("if", Sampler(kind="map", steps=FOUR), "TCDScheduler"),
    "sd3 re-noises": ("sd3", Sampler(steps=FOUR), "FlowMatchEulerDiscreteScheduler"),
    "z-image by its own jumps": ("z_image", Sampler(kind="map", steps=FOUR), "FlowMatchEulerDiscreteScheduler"),
    "flux by its own jumps": ("flux", Sampler(kind="map", steps=FOUR), "FlowMatchEulerDiscreteScheduler"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_stock_pipeline_goes_on_from_a_picture_as_the_sampler_does(
    folders: dict[str, Path], tmp_path: Path, case: str
):
    name, sampler, scheduler = CASES[case]
    level = next(u for u in sampler.steps if u < 1)
    product = student(folders[name], name, sampler)
    done = export(product, tmp_path / "out", image_to_image=level)
    assert done.parity < 5e-6, done.parity
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == PIPELINES[json.loads((folders[name] / "model_index.json").read_text())["_class_name"]]
    assert index["scheduler"][1] == scheduler
    assert 'pipeline_tag: "image-to-image"' in (tmp_path / "out" / "README.md").read_text().split("---")[1]
    check_call(done.usage)
    checked = check_student(str(tmp_path / "out"))
    assert checked.ok, checked.text()
    assert checked.calls == len([u for u in sampler.steps if u <= level])
    with pytest.raises(UserError, match="goes on from a picture; draw from it with diffusers as its card shows"):
        called(tmp_path / "out", None, False)


def test_diffusers_own_door_to_these_pipelines_opens_the_folder(folders: dict[str, Path], tmp_path: Path):
    from diffusers import AutoPipelineForImage2Image

    for name, cls in (("sd15", "StableDiffusionImg2ImgPipeline"), ("if", "IFImg2ImgPipeline")):
        export(student(folders[name], name, Sampler(steps=FOUR)), tmp_path / name, image_to_image=0.5)
        told = json.loads((tmp_path / name / "model_index.json").read_text())
        absent: Any = {k: None for k, v in told.items() if v == [None, None]}
        pipe = AutoPipelineForImage2Image.from_pretrained(tmp_path / name, **absent, requires_safety_checker=False)
        assert type(pipe).__name__ == cls


def test_the_lines_of_deepfloyd_hand_on_a_picture_of_any_sides(folders: dict[str, Path], tmp_path: Path):
    """Its pipeline cuts files to squares of multiples of 8 and of a number; these samples have 8 x 12 pixels."""
    done = export(student(folders["if"], "if", Sampler(steps=FOUR)), tmp_path / "out", image_to_image=0.5)
    words = 'prompt="a red fox in the snow"'
    assert words in done.usage
    run_snippet(done.usage.replace(words, "prompt_embeds=torch.zeros(1, 7, 12)"), tmp_path / "reader")
    with Image.open(tmp_path / "reader" / "sample.png") as drawn:
        assert drawn.size == (12, 8)


def test_numbers_of_the_sampler_from_noise_are_not_on_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "results.json").write_text("[]")
    shown: list[Any] = []
    for name, stand_in in {
        "check_product": lambda product: None,
        "read_results": lambda file: [],
        "card_results": lambda found: [("FD", "1.2")],
        "show_export": lambda done: None,
        "export": lambda product, folder, results, **form: shown.append(results),
    }.items():
        monkeypatch.setattr(commands, name, stand_in)
    product: Any = None
    for level in (None, 0.5):
        commands._export(product, tmp_path, tmp_path / "out", {"image_to_image": level})
    assert shown == [[("FD", "1.2")], []]


def test_several_networks_are_not_written_without_it(folders: dict[str, Path]):
    product = student(folders["sd15"], "sd15", Sampler(steps=FOUR))
    several = replace(product, net=Routed([product.net, product.net], ByClass(4, 2)), classes=4)
    with pytest.raises(ExportRefused, match=r"a student of several networks .* draw with the loop"):
        parts_of(several, image_to_image=0.5)


def test_what_it_begins_with_is_the_picture_noised_to_the_level(folders: dict[str, Path]):
    """An exact denoiser of one picture gives it back; of any other start it would not."""
    product = student(folders["if"], "if", Sampler(steps=(0.5,)))
    wrapper: Any = product.net.net
    picture = torch.rand(2, 3, 8, 12) * 2 - 1
    seen = []

    def listens(x: Any, t: Any, cond: Any) -> Any:
        seen.append((x, t))
        return product.net(x, t, cond)

    listens.process = product.net.process  # type: ignore[attr-defined]
    draw_from(listens, product.sampler, wrapper, picture, wrapper.example(2), seed=4)
    (x, t), noise = seen[0], torch.randn(picture.shape, generator=torch.Generator().manual_seed(4))
    assert torch.equal(x, add_noise(product.net.process, picture, noise, t)[0])
    assert float(t[0]) == 500


def test_a_level_at_which_it_was_not_trained_is_refused(folders: dict[str, Path], tmp_path: Path):
    product = student(folders["sd15"], "sd15", Sampler(steps=FOUR))
    for level in (0.6, 1.0):
        with pytest.raises(ExportRefused, match=r"image_to_image .*expected one of 0\.75, 0\.5, 0\.25"):
            export(product, tmp_path / "out", image_to_image=level)
    once = student(folders["sd15"], "sd15", Sampler(steps=(1.0,)))
    with pytest.raises(ExportRefused, match="expected a student with a step below 1"):
        export(once, tmp_path / "out", image_to_image=1.0)
    assert begun(product, 0.5).sampler.steps == (0.5, 0.25)
    with pytest.raises(UserError, match="--image-to-image: an adapter is loaded into any pipeline of its base"):
        check_options(True, "fp32", "diffusers", False, 0.5)


def test_where_there_is_none_the_refusal_brings_the_loop(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(ExportRefused, match="has no image-to-image pipeline of PixArtSigmaPipeline") as found:
        export(student(folders["pixart"], "pixart", Sampler(steps=FOUR)), tmp_path / "out", image_to_image=0.75)
    lines = str(found.value).splitlines()
    assert "draw with the loop" in lines[0]
    compile("\n".join(line.strip() for line in lines[1:]), "loop", "exec")
    assert "steps=(0.75, 0.5, 0.25)" in lines[3]
    assert not (tmp_path / "out").exists()
    uneven = student(make_pipeline(tmp_path / "sd15", "sd15"), "sd15", Sampler(steps=(0.5,)))
    with pytest.raises(ExportRefused, match=r"opens no UNet whose sample_size is \[8, 12\]"):
        export(uneven, tmp_path / "out", image_to_image=0.5)
    odd = student(folders["sd15"], "sd15", Sampler(steps=(0.7503, 0.25)))
    with pytest.raises(ExportRefused, match=r"fall between the 1000 indices.*; draw with the loop"):
        image_to_image_stock(odd.net, odd.sampler, "StableDiffusionPipeline")


def test_the_loop_of_a_refusal_draws(tmp_path: Path):
    """A class-conditional UNet of one channel: the lines of the refusal, run as they stand."""
    import dataclasses

    import fewstep
    from fewstep.train.build import build_roles
    from fewstep.train.product import product_of

    told = fewstep.load("digits-dmd2", ["method.steps=[1.0, 0.5]"])
    data: Any = told.data.open()
    product = product_of(told, build_roles(told, data).student, data, "student")
    with pytest.raises(
        ExportRefused, match="no stock pipeline noises a picture for a UNet2D student; draw with"
    ) as found:
        parts_of(product, image_to_image=0.5)
    code = "\n".join(line.strip() for line in str(found.value).splitlines()[1:]).replace(
        "fewstep.open_product(RUN)", "PRODUCT"
    )
    names: dict[str, Any] = {"fewstep": fewstep, "dataclasses": dataclasses, "torch": torch, "PRODUCT": product}
    image, cond = torch.rand(3, 1, 8, 8) * 2 - 1, torch.tensor([1, 2, 3])
    with torch.no_grad():
        exec(code, names | {"image": image, "cond": cond}, names)
    assert names["x"].shape == (3, 1, 8, 8)


def test_the_command_says_so_and_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "run", make_teacher(tmp_path / "teacher"), "method.steps=[1.0, 0.5]")
    code, _, err = call_of(capfd, "export", run, "--image-to-image", 0.5)
    assert code == 2
    assert "not exported: no stock pipeline noises a picture for a UNet2D student; draw with the loop" in err
    assert "fewstep.sample(sampler, product.net, noise, cond, fresh, start=start)" in err
    assert not (run / "image-to-image").exists()
    code, _, err = call_of(capfd, "export", run, "--image-to-image", 0.7)
    assert "expected one of 0.5" in err
    code, _, err = call_of(capfd, "export", run, "--steps", 2)
    assert "--steps: is for a folder by `fewstep fit` and for students of several lists of steps" in err
