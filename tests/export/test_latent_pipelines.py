"""A student of a text or latent pipeline runs in its stock class, at the trained levels, or is not written."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from snippets import check_call, run_snippet
from tiny_families import TODAY
from tiny_pipelines import FAMILIES, make_pipeline, network_of, unet_condition
from tiny_runs import names
from tiny_students import make_product
from tiny_text import text_pipeline
from torch import Tensor

from fewstep.algebra.process import EDM, DiscreteVP, Flow, ShiftedFlow, Trig
from fewstep.algebra.sampling import Sampler
from fewstep.commands.check_recipe import check_recipe
from fewstep.config import UserError
from fewstep.export import base, latent
from fewstep.export.base import PARITY, ExportRefused, Stock
from fewstep.export.choose import export
from fewstep.export.latent import guided
from fewstep.export.levels import Levels, agree, check_product, levels_of, levels_of_scheduler
from fewstep.export.stock import difference
from fewstep.networks.adapters import Adapted, frozen
from fewstep.networks.denoiser import Denoiser, Rescheduled
from fewstep.networks.wrappers import WRAPPERS
from fewstep.recipe.store import load
from fewstep.train.product import Product, open_product

FOUR = (1.0, 0.75, 0.5, 0.25)
UNEVEN = (1.0, 0.7, 0.312)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: make_pipeline(root / name, name) for name in FAMILIES}


def models() -> dict[str, Any]:
    """Networks by the argument that guides in their pipelines, "" for those whose only scale is an input."""
    sana: Any = network_of(FAMILIES["sana"].build())
    told = {key: value for key, value in sana.config.items() if key != "_use_default_values"}  # which undo what is set
    return {
        "guidance_scale": [network_of(make()) for make in (FAMILIES["sd3"].build, TODAY["flux2_klein"].build)],
        "true_cfg_scale": [
            network_of(make())
            for make in (FAMILIES["flux"].build, *(TODAY[n].build for n in ("hunyuan_video", "qwen_image")))
        ],
        "": [
            network_of(TODAY["flux2"].build()),
            unet_condition(time_cond_proj_dim=8),
            type(sana).from_config(told | {"guidance_embeds": True}),
        ],
    }


def test_the_scale_on_a_card_is_the_one_that_mixes_two_answers():
    """An embedded scale (Flux, HunyuanVideo, FLUX.2 dev, SANA-Sprint, LCM) is an input, and another thing."""
    product: Any = SimpleNamespace(recipe=SimpleNamespace(method=SimpleNamespace(guidance=3.0)))
    for key, nets in models().items():
        for model in nets:
            told = guided(product, WRAPPERS[type(model).__name__](model))
            said = f"3 where 1 is none; of the teacher's pipeline {key}=3"
            assert told == ([("guidance in its weights", said)] if key else [])


@pytest.mark.parametrize("name", FAMILIES)
def test_each_class_is_written_and_drawn_alike_by_its_stock_pipeline(folders: dict[str, Path], tmp_path: Path, name: str):
    product = make_product(folders[name], name, Sampler(kind="renoise", steps=FOUR))
    done = export(product, tmp_path / "out")
    assert 0 < done.parity <= PARITY
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    before = json.loads((folders[name] / "model_index.json").read_text())
    assert index["_class_name"] == FAMILIES[name].pipeline == before["_class_name"]
    changed = {k for k in before if index[k] != before[k]}
    assert changed <= {"scheduler"}
    if (folders[name] / "vae").is_dir():
        for file in ("config.json", "diffusion_pytorch_model.safetensors"):
            assert (tmp_path / "out" / "vae" / file).read_bytes() == (folders[name] / "vae" / file).read_bytes()
    assert done.usage.splitlines()[0] == f"from diffusers import {FAMILIES[name].pipeline}"
    check_call(done.usage)
    if name == "dit":  # the one without a text encoder, which these folders do not have
        run_snippet(done.usage, tmp_path / "reader")
    assert done.usage in (tmp_path / "out" / "README.md").read_text()
    assert not [p for p in (tmp_path / "out").rglob("*") if p.suffix in (".bin", ".ckpt", ".pkl", ".pth")]


def test_an_exported_folder_is_opened_again(folders: dict[str, Path], tmp_path: Path):
    product = make_product(folders["dit"], "dit", Sampler(steps=FOUR))
    export(product, tmp_path / "dit")
    again = open_product(tmp_path / "dit")
    assert (again.shape, again.classes, again.trained) == ((4, 8, 8), 1000, (4,))
    labels = torch.tensor([3, 999, 0])
    ours = product.draw(3, seed=2, labels=labels)
    assert difference(again.draw(3, seed=2, labels=labels), ours) <= 1e-4
    export(make_product(folders["sd3"], "sd3", Sampler(steps=(1.0,))), tmp_path / "sd3")
    with pytest.raises(UserError, match="takes text; draw from it with diffusers' StableDiffusion3Pipeline"):
        open_product(tmp_path / "sd3")
    told = json.loads((tmp_path / "sd3" / "fewstep.json").read_text())
    assert (told["steps"], told["size"]) == ([1.0], [8, 12])
    # Its transformer is for 8 x 8 latents of 2 pixels, the student for 8 x 12.
    assert told["settings"] == {"guidance_scale": 1.0, "height": 16, "width": 24}


def test_a_call_says_what_the_pipelines_own_defaults_would_change(folders: dict[str, Path]):
    from fewstep.export.call import settings_of
    from fewstep.export.latent import source_of

    def settings(name: str, *more: str) -> dict[str, Any]:
        product = make_product(folders[name], name, Sampler(steps=(1.0,)), *more)
        net: Any = product.net
        return settings_of(product, source_of(product), net.net)

    assert settings("sd15") == {"guidance_scale": 1.0}
    assert settings("dit") == {"guidance_scale": 1.0}  # DiTPipeline's own is 4
    assert settings("flux") == {"guidance_scale": 2.5, "height": 12, "width": 16}
    assert settings("pixart") == {"guidance_scale": 1.0, "clean_caption": False, "height": 16, "width": 24}
    assert settings("sana") == {"guidance_scale": 1.0, "complex_human_instruction": None}
    encoder = f"{{name: pipeline, path: {folders['sd3']}, length: 77}}"
    data = f"data={{name: prompts, path: p.txt, shape: [6, 8, 12], encoder: {encoder}}}"
    assert settings("sd3", data)["max_sequence_length"] == 77


def drawn(product: Product, tmp_path: Path) -> Tensor:
    """Latents of the exported folder, by the usage line's arguments and nothing of fewstep."""
    from diffusers import DiffusionPipeline

    export(product, tmp_path / "out")
    encoders = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", **dict.fromkeys(encoders))
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(3)
    call: dict[str, Any] = json.loads((tmp_path / "out" / "fewstep.json").read_text())["call"]
    start, text, pooled = (
        torch.randn(2, 6, 8, 12, generator=g),
        torch.randn(2, 7, 12, generator=g),
        torch.randn(2, 10),
    )
    size = {"height": 16, "width": 24, "latents": start, "guidance_scale": 1.0, "output_type": "latent"}
    torch.manual_seed(11)
    theirs = pipe(prompt_embeds=text, pooled_prompt_embeds=pooled, **size, **call).images
    # The same by hand: x0 = x - t v, then (1 - s) x0 + s noise, on the bare transformer.
    torch.manual_seed(11)
    x, times = start, [3 * u / (1 + 2 * u) for u in product.sampler.steps]
    model: Any = product.net.net.model  # type: ignore[union-attr]
    for i, t in enumerate(times):
        with torch.no_grad():
            v = model(x, text, pooled, torch.full((2,), 1000 * t), return_dict=False)[0]
        x0 = x - t * v
        if i + 1 == len(times):
            break
        s = times[i + 1]
        renoised = (1 - s) * x0 + s * torch.randn(2, 6, 8, 12) if product.sampler.kind == "renoise" else x + (s - t) * v
        x = renoised
    assert difference(x0, theirs) <= 1e-4
    return theirs


def test_sd3_re_noises_and_follows_the_ode_at_shifted_levels(folders: dict[str, Path], tmp_path: Path):
    torch.manual_seed(0)
    noisy = drawn(make_product(folders["sd3"], "sd3", Sampler(kind="renoise", steps=UNEVEN)), tmp_path / "a")
    plain = drawn(make_product(folders["sd3"], "sd3", Sampler(kind="map", steps=UNEVEN)), tmp_path / "b")
    assert float((noisy - plain).abs().max()) > 0.1


def test_kinds_of_samplers_find_their_scheduler(folders: dict[str, Path], tmp_path: Path):
    def written(name: str, sampler: Sampler) -> tuple[str, dict[str, Any]]:
        folder = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        export(make_product(folders[name], name, sampler), folder)
        index = json.loads((folder / "model_index.json").read_text())
        return index["scheduler"][1], json.loads((folder / "fewstep.json").read_text())["call"]

    assert written("sd15", Sampler(steps=(1.0,))) == ("DDIMScheduler", {"num_inference_steps": 1})
    assert written("sd15", Sampler(steps=FOUR)) == ("LCMScheduler", {"num_inference_steps": 4})
    assert written("sd21", Sampler(steps=UNEVEN)) == ("LCMScheduler", {"timesteps": [999, 699, 311]})
    assert written("dit", Sampler(kind="map", steps=FOUR)) == ("DDIMScheduler", {"num_inference_steps": 4})
    assert written("pixart", Sampler(kind="gamma", steps=FOUR, eta=0.3))[1] == {
        "num_inference_steps": 4,
        "eta": 0.3,
    }
    name, call = written("sana", Sampler(steps=(1.0, 0.5)))
    assert name == "FlowMatchEulerDiscreteScheduler"
    assert call == {"num_inference_steps": 2}
    config = json.loads((tmp_path / "sana5" / "scheduler" / "scheduler_config.json").read_text())
    assert config["shift_terminal"] == 0.75
    assert written("sana", Sampler(steps=UNEVEN))[1] == {"sigmas": [1.0, 0.875, pytest.approx(0.576354680)]}
    assert written("flux", Sampler(kind="map", steps=FOUR))[1] == {"num_inference_steps": 4}
    assert written("flux", Sampler(steps=(0.9, 0.4)))[1].keys() == {"sigmas"}
    shift = json.loads((tmp_path / "flux7" / "scheduler" / "scheduler_config.json").read_text())["shift"]
    assert shift == pytest.approx(1.58201273, rel=1e-8)


def test_an_adapter_and_a_constant_input_are_merged(folders: dict[str, Path], tmp_path: Path):
    product = make_product(folders["sd3"], "sd3", Sampler(steps=(1.0, 0.5)))
    base = frozen(copy.deepcopy(product.net))
    student = Adapted(base, "student", rank=2, targets=["to_q", "to_k"])
    for p in student.own.values():
        p.data.normal_(std=0.3)
    done = export(replace(product, net=student), tmp_path / "lora")
    assert done.parity <= PARITY
    net: Any = copy.deepcopy(product.net)
    net.add_inputs(("s",))
    net.net.extras["s"].linear.weight.data.normal_(std=0.3)
    assert export(replace(product, net=net), tmp_path / "folded").parity <= PARITY
    with pytest.raises(UserError, match="this student is told where each of its 2 steps ends, and no stock pipeline"):
        export(replace(product, net=net, sampler=Sampler(kind="map", steps=(1.0, 0.5))), tmp_path / "no")


def test_what_no_stock_pipeline_runs_is_refused(folders: dict[str, Path], tmp_path: Path):
    def refused(product: Product) -> str:
        with pytest.raises(ExportRefused) as caught:
            export(product, tmp_path / "out")
        assert names(tmp_path) == []
        return str(caught.value)

    dit = make_product(folders["dit"], "dit", Sampler(steps=UNEVEN))
    assert refused(dit).startswith(
        "DiTPipeline takes no levels of its own, and [1.0, 0.7, 0.312] are not evenly spaced; train at 1 - i/3"
    )
    sd3 = make_product(folders["sd3"], "sd3", Sampler(steps=FOUR))
    assert refused(replace(sd3, net=Rescheduled(sd3.net, Trig()))).startswith(
        "a student inside Rescheduled has no stock scheduler; train it in its teacher's own process"
    )
    assert refused(replace(sd3, sampler=Sampler(kind="gamma", steps=FOUR, eta=0.5))) == (
        "no stock flow scheduler takes steps of eta 0.5; set it to 0 or 1"
    )
    other = Denoiser(sd3.net.net, EDM(), "edm", "log_sigma/4")  # type: ignore[arg-type]
    assert refused(replace(sd3, net=other)).startswith("StableDiffusion3Pipeline has no scheduler for a student")
    assert refused(replace(sd3, recipe=load("toy/dmd2"))).startswith("the recipe's teacher is no diffusers folder")


def test_a_wrong_schedule_or_a_parity_violation_leaves_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    product = make_product(folders["sd3"], "sd3", Sampler(steps=FOUR))
    real = latent.latent_stock

    def moved(net: Any, sampler: Sampler) -> Stock:
        """The shift applied twice: what happens to sigmas that are handed to the teacher's own scheduler."""
        stock = real(net, sampler)
        twice = {"sigmas": [1.0, 0.9, 0.75, 0.5]}
        return replace(stock, config={"shift": 3.0, "stochastic_sampling": True}, call=twice)

    with monkeypatch.context() as patch:
        patch.setattr(latent, "latent_stock", moved)
        with pytest.raises(UserError) as caught:
            export(product, tmp_path / "out")
        lines = str(caught.value).splitlines()
        assert lines[0].startswith(
            "schedule: evaluation and exported scheduler stand at different noise levels (by 0.25,"
        )
        assert lines[1:3] == ["  training:           -", "  evaluation:         pure noise, 9, 3, 1"]
        name, _, exported = lines[3].partition(":")
        assert name == "  exported scheduler"
        first, *others = exported.split(",")
        assert first.strip() == "pure noise"
        assert [float(v) for v in others] == pytest.approx([27, 9, 3], rel=1e-5)
        patch.setattr(latent, "check_export", lambda *_: None)
        with pytest.raises(UserError, match=r"call\.sigmas stands at the levels \[1\.0, 0\.9, 0\.75, 0\.5\]"):
            export(product, tmp_path / "out")  # its own note is read back
        patch.setattr(base, "read_note", lambda *_: None)
        with pytest.raises(ExportRefused, match="the pipeline differs from fewstep's sampler by"):
            export(product, tmp_path / "out")
    assert names(tmp_path) == []
    broken = copy.deepcopy(product.net)
    broken.net.model.proj_out.bias.data.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(UserError, match="differs from fewstep's sampler by nan"):
        export(replace(product, net=broken), tmp_path / "out")
    assert names(tmp_path) == []


def test_lint_compares_three_lists_to_one_in_a_million():
    p = DiscreteVP()
    same = levels_of(p, FOUR)
    agree(same, same, levels_of_scheduler(DDIMScheduler(timestep_spacing="trailing"), num_inference_steps=4))
    agree(None, same)
    # One table index at pure noise: sigma differs by 4e-7 only, alpha gives it away.
    near = levels_of(p, (0.999, 0.75, 0.5, 0.25))
    assert float((near.sigma - same.sigma).abs().max()) < 1e-6
    lists = {"training": near, "evaluation": same, "exported scheduler": same}
    for wrong in lists:
        given = [near if name == wrong else same for name in lists]
        with pytest.raises(UserError) as caught:
            agree(*given)
        assert wrong in str(caught.value).splitlines()[0]
        rows = [line.split(":")[1].strip() for line in str(caught.value).splitlines()[1:]]
        assert [row == near.shown() for row in rows] == [name == wrong for name in lists]
    with pytest.raises(UserError, match="by inf"):
        agree(same, levels_of(p, FOUR[:3]))
    with pytest.raises(UserError, match="by inf"):
        agree(same, Levels(same.alpha * float("nan"), same.sigma))
    flow = ShiftedFlow(shift=3.0)
    moved = levels_of_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), sigmas=list(FOUR))
    agree(None, levels_of(flow, FOUR), moved)
    with pytest.raises(UserError, match=r"sigma / alpha, first to last:"):
        agree(None, levels_of(Flow(), FOUR), moved)
    # LCM's usual grid of 50 floors its indices: 4 steps are 999, 759, 499, 259.
    lcm = LCMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    floored = levels_of_scheduler(lcm, num_inference_steps=4)
    agree(None, levels_of(p, (1.0, 0.76, 0.5, 0.26)), floored)
    with pytest.raises(UserError, match="stand at different noise levels"):
        agree(None, same, floored)


def test_lint_of_products_and_recipes(folders: dict[str, Path]):
    product = make_product(folders["sd15"], "sd15", Sampler(steps=FOUR))
    check_product(product)
    with pytest.raises(UserError, match="training and evaluation stand at different"):
        check_product(replace(product, sampler=Sampler(steps=(1.0, 0.5))))
    assert check_recipe(load("digits-dmd2")) == (
        "schedule: training, evaluation and CMStochasticIterativeScheduler agree (sigma / alpha 80)"
    )
    text = text_pipeline(folders["sd15"].parent / "text", ["a"])
    latents = f"data={{name: prompts, path: prompts.txt, shape: [4, 8, 12], encoder: {{name: pipeline, path: {text}}}}}"
    settings = [f"teacher.path={folders['sd15']}", latents, "discriminator=null", "method.gan=null", "evaluate=null"]
    settings.append("optim={default: {lr: 1e-4}}")
    told = check_recipe(load("digits-dmd2", [*settings, f"method.steps={list(FOUR)}"]))
    assert told.startswith("schedule: training, evaluation and LCMScheduler agree (sigma / alpha 14.6")
    off = check_recipe(load("digits-dmd2", [*settings, "method.steps=[1.0, 0.1234567]"]))
    assert "fall between the 1000 indices of the table" in off


def test_half_precision_is_what_was_rounded_and_nothing_else(folders: dict[str, Path], tmp_path: Path):
    """The export in bf16 draws what the student draws whose weights were rounded; the card says whose it is."""
    folder = Path(shutil.copytree(folders["sd3"], tmp_path / "T"))
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: some-licence\n---\nlicense: mit\n")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/model"}))
    product = make_product(folder, "sd3", Sampler(steps=(1.0, 0.5)))
    done = export(product, tmp_path / "half", dtype="bf16")
    assert done.parity <= PARITY
    from safetensors.torch import load_file

    written = load_file(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    own = product.net.net.model.state_dict()  # type: ignore[union-attr]
    assert {v.dtype for v in written.values()} == {torch.bfloat16}
    assert all(torch.equal(written[k], own[k].bfloat16()) for k in written)
    front = (tmp_path / "half" / "README.md").read_text().split("---")[1]
    assert (
        'pipeline_tag: "text-to-image"\nbase_model: "org/model"\nlicense: "other"\nlicense_name: "some-licence"' in front
    )
    named = export(product, tmp_path / "named", dtype="bf16", variant=True)
    assert names(tmp_path / "named" / "transformer") == ["config.json", "diffusion_pytorch_model.bf16.safetensors"]
    assert '("' + str(tmp_path / "named") + '", variant="bf16")' in named.usage
    assert named.parity <= PARITY
    product.net.net.model.proj_out.bias.data.fill_(1e6)  # type: ignore[union-attr]
    with pytest.raises(ExportRefused, match=r"torch.float16 cannot hold .*proj_out.bias"):
        export(product, tmp_path / "no", dtype="fp16")
