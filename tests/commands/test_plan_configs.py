"""The plan from configs alone against the plan with weights, the shipped configs, and what cannot be planned so."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
from tiny_families import TODAY, make_today
from tiny_new import stand_in_for_text
from tiny_pipelines import FAMILIES, make_pipeline, network_of

from fewstep.commands.new_pipeline import look
from fewstep.commands.plan import plan
from fewstep.commands.plan_configs import Sizes, _row, located, padded, shipped, sizes_of
from fewstep.commands.plan_passes import Passes
from fewstep.commands.plan_report import report
from fewstep.config import UserError
from fewstep.networks.outline import shapes
from fewstep.networks.wrappers import WRAPPERS
from fewstep.recipe.store import load

RECIPE = """about: text
data: {{name: prompts, path: {root}/prompts.txt, shape: {shape}, encoder: {{name: pipeline, path: {root}/whole}}}}
teacher: {{name: diffusers, path: {root}/whole, {more}}}
student: {{name: {role}, of: teacher}}
critic: {{name: {role}, of: teacher}}
method: {{name: dmd2, gan: null, critic: {{weight: {kind}, steps: 2}}, guidance: 3.0, steps: [1.0, 0.75, 0.5, 0.25]}}
optim: {{default: {{lr: 1e-3}}}}
train: {{steps: 2, batch: 2, product: student, ema: [], checkpointing: {saved}, precision: {precision}, offload: {away}}}
evaluate: null
"""
CASES = [
    ("sdxl", "lora", "dtype: bf16", True, "bf16", False),
    ("sd3", "copy", "dtype: fp32", False, "fp32", True),
    ("flux", "lora", "guidance: 3.5, dtype: bf16", True, "fp32", False),
    ("wan", "copy", "dtype: bf16", False, "bf16", False),
    ("lumina2", "lora", "dtype: fp32", True, "fp32", False),
    ("krea2", "lora", "dtype: fp32", False, "fp32", False),
    ("chroma", "lora", "dtype: fp32", False, "fp32", False),
]


def shape_of(case: tuple[Any, ...]) -> tuple[int, ...]:
    return (TODAY if case[0] in TODAY else FAMILIES)[case[0]].shape


def made(root: Path, case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Sizes]:
    """A recipe of a tiny family and the sizes of its embedded prompts; the folder is `whole`."""
    name, role, more, saved, precision, away = case
    today = name in TODAY
    folder = make_today(root / "whole", name) if today else make_pipeline(root / "whole", name)
    wrapper = look(str(folder)).wrapper
    stand_in_for_text(monkeypatch, wrapper)
    monkeypatch.setenv("FEWSTEP_CACHE", str(root / "cache"))
    (root / "prompts.txt").write_text("a red square\ntwo green dots\nblue\n")
    shape = list(shape_of(case))
    kind = "velocity" if today else FAMILIES[name].kind
    flags = {"saved": str(saved).lower(), "away": str(away).lower(), "precision": precision}
    text = RECIPE.format(root=root, shape=shape, more=more, role=role, kind=kind, **flags)
    (root / "mine.yaml").write_text(text)
    _, tokens, *_, width = wrapper.example(1)["text"].shape
    return root / "mine.yaml", Sizes(text=(tokens, width))


@pytest.mark.parametrize("case", CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_a_plan_from_configs_is_that_with_weights(case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe, sizes = made(tmp_path, case, monkeypatch)
    with_weights = plan(load(str(recipe)), ways=False)
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        file.unlink()
    (tmp_path / "prompts.txt").unlink()
    shutil.rmtree(tmp_path / "cache")
    bare = plan(load(str(recipe)), ways=False, sizes=sizes)
    assert bare.roles == with_weights.roles
    assert bare.total == pytest.approx(with_weights.total, rel=0.01)
    assert bare.activations == pytest.approx(with_weights.activations, rel=0.02)
    assert bare.configs.startswith(f"configs: {tmp_path / 'whole'}, x {'x'.join(map(str, shape_of(case)))}, text 7x")
    longer = plan(load(str(recipe)), ways=False, sizes=Sizes(text=(4 * sizes.text[0], sizes.text[1])))  # type: ignore[index]
    assert longer.total > bare.total


@pytest.mark.parametrize(
    ("name", "text", "mask"),
    [("sdxl", (77, 12), False), ("sd3", (256 + 77, 12), False), ("flux", (512, 12), False), ("lumina2", (256, 16), True),
     ("krea2", (512, 3, 16), True), ("chroma", (512, 16), True), ("z_image", (512, 16), False),
     ("hunyuan_video", (256, 16), True)],
)  # fmt: skip
def test_a_text_is_as_long_as_its_pipeline_makes_it_and_keeps_a_mask_that_cuts_nothing(
    name: str, text: tuple[int, ...], mask: bool
):
    model: Any = network_of(TODAY[name].build() if name in TODAY else FAMILIES[name].build())
    wrapper = WRAPPERS[type(model).__name__](model)
    row = _row(wrapper, SimpleNamespace(data=None), Sizes())  # type: ignore[arg-type]
    assert row is not None
    assert tuple(row["text"].shape) == (1, *text)
    assert {k: tuple(v.shape) for k, v in row.items() if k == "mask"} == ({"mask": (1, text[0])} if mask else {})
    asked = SimpleNamespace(data=SimpleNamespace(encoder=SimpleNamespace(length=20)))
    short = _row(wrapper, asked, Sizes())  # type: ignore[arg-type]
    assert short is not None
    assert short["text"].shape[1] == (97 if name == "sd3" else 20)


def test_the_length_of_a_prompt_is_that_of_the_installed_pipeline():
    """Figures of diffusers 0.42; its call says them, and one that says none has CLIP's."""
    known = {
        "HunyuanVideoPipeline": 256, "Lumina2Pipeline": 256, "AuraFlowPipeline": 256, "OvisImagePipeline": 256,
        "SanaVideoPipeline": 300, "SanaSprintPipeline": 300, "PixArtAlphaPipeline": 120, "FluxPipeline": 512,
        "StableDiffusionXLPipeline": None, "": None,
    }  # fmt: skip
    assert {name: padded(name) for name in known} == known


def test_passes_that_are_not_traced_anew_count_as_if_they_were(  # but for a block's casts, which are made twice
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, sizes = made(tmp_path, CASES[0], monkeypatch)
    quick = plan(load(str(recipe)), ways=False, sizes=sizes)
    monkeypatch.setattr(Passes, "of", lambda self, modules: nullcontext())
    assert quick.total == pytest.approx(plan(load(str(recipe)), ways=False, sizes=sizes).total, rel=0.01)


@pytest.mark.parametrize("name", sorted(folder.name for folder in shipped().values()))
def test_shipped_configs_have_the_published_size(name: str):
    """Within 1 %, or what the last published digit leaves open."""
    root = shipped()[next(key for key, folder in shipped().items() if folder.name == name)]
    about = json.loads((root / "about.json").read_text())
    assert about["source"]
    assert about["source_of_vae_and_scheduler"]
    assert about["parameters_source"]
    part = "unet" if (root / "unet").is_dir() else "transformer"
    config = json.loads((root / part / "config.json").read_text())
    with shapes():
        model: Any = getattr(diffusers, config["_class_name"]).from_config(config)
    count, published = sum(t.numel() for t in model.state_dict().values()), about["parameters"]
    open_digits = published / 8 if "one digit" in about["parameters_source"] else 0  # 4 stands for 3.5 to 4.5
    assert count == pytest.approx(published, rel=0.01, abs=open_digits)
    index = json.loads((root / "model_index.json").read_text())
    assert look(f"assets:configs/{name}").pipeline == index["_class_name"]


def test_sizes_are_read_and_refused_by_their_option():
    assert sizes_of("4x128x128", "77x2048") == Sizes((4, 128, 128), (77, 2048))
    assert sizes_of("16x21x60x104", None) == Sizes((16, 21, 60, 104), None)
    for shape, text, said in (("4x128", None, "--shape 4x128: expected"), (None, "77", "--text 77: expected tokens x"),
                              ("4x0x8", None, "--shape 4x0x8"), (None, "77x2048x1", "--text")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            sizes_of(shape, text)


def test_a_folder_that_is_not_here_is_that_of_the_shipped_configs(tmp_path: Path):
    assert located("somewhere/stable-diffusion-xl-base-1.0") == "assets:configs/sdxl"
    assert located("somewhere/stable-diffusion-xl-base-1.0@v1") == "assets:configs/sdxl"
    with pytest.raises(UserError, match=r"; fetch its own with `hf download org/other --revision v1` or --download$"):
        located("org/other@v1")
    assert located(str(tmp_path)) == str(tmp_path)
    with pytest.raises(UserError, match=r"teacher my-sdxl: no such folder, and no shipped configs of that name; .*Qwen"):
        located("my-sdxl")


def test_what_configs_do_not_tell_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = load(str(made(tmp_path, CASES[0], monkeypatch)[0]))
    with pytest.raises(UserError, match="--text 7x13: the text of this teacher is 12 wide"):
        plan(recipe, ways=False, sizes=Sizes(text=(7, 13)))
    with pytest.raises(UserError, match=r"takes 4 channels, but the data has shape \[5, 8, 12\]"):
        plan(recipe, ways=False, sizes=Sizes(shape=(5, 8, 12)))
    with pytest.raises(UserError, match="leave --weights none out"):
        report("toy/dmd2", measure=True, sizes=Sizes())


def test_toys_are_planned_without_a_folder_too():
    recipe = load("toy/dmd2", ["train.batch=64"])
    assert plan(recipe, ways=False, sizes=Sizes()).total == pytest.approx(plan(recipe, ways=False).total, rel=0.01)
