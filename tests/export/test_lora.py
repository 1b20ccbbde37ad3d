"""Adapters in the layouts of others: diffusers' converter and ComfyUI's rule merge what was trained, none is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import FAMILIES, make_pipeline

from fewstep.algebra.sampling import Sampler
from fewstep.config import UserError
from fewstep.export.comfy import WORKFLOW
from fewstep.export.lora import _front, export_lora, lora_parts
from fewstep.networks.adapters import Adapted, frozen, network_of, own_state, plain_copy
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.lora_file import NAME, component, diffusers_model, read_lora
from fewstep.networks.lora_formats import merged_by_comfyui
from fewstep.recipe.store import load
from fewstep.train.product import Product

TARGETS = {"sdxl": ["to_q", "to_k", "to_out.0", "conv1", "proj_in"], "sd3": ["to_q", "to_out.0", "add_k_proj"]}


@pytest.fixture(scope="module", params=TARGETS)
def product(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Product:
    """An adapter whose alpha is a quarter of its rank."""
    name: str = request.param
    folder = make_pipeline(tmp_path_factory.mktemp("lora") / name, name)
    net = frozen(load_denoiser(str(folder), size=FAMILIES[name].shape[1:]))
    student = Adapted(net, "student", rank=4, alpha=1.0, targets=TARGETS[name])
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in student.own.values():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    recipe = load("digits-dmd2", [f"teacher.path={folder}", "method.steps=[1.0,0.5]", "method.guidance=3.0"])
    sampler = Sampler(kind="renoise", steps=(1.0, 0.5))
    return Product(student, sampler, FAMILIES[name].shape, 0, "student", (2,), recipe, 7)


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_a_file_is_merged_as_it_was_trained_and_read_again(product: Product, tmp_path: Path, layout: str):
    student: Any = product.net
    part = component(diffusers_model(network_of(student.base))[1])
    if layout == "kohya" and part != "unet":
        with pytest.raises(UserError, match="--format kohya: layers of transformers have the original repositories"):
            export_lora(product, tmp_path / "out", layout)
        return
    done = export_lora(product, tmp_path / "out", layout)
    assert done.parity < 1e-5
    found = load_file(tmp_path / "out" / NAME)
    front = "lora_unet_" if part == "unet" else "transformer."
    assert all(k.startswith(front) for k in found)
    assert {float(v) for k, v in found.items() if k.endswith(".alpha")} == {1.0}
    assert len(found) == 3 * len(student.own) // 2
    other = Adapted(student.base, "other", rank=4, alpha=1.0, targets=student.targets)
    read_lora(other, tmp_path / "out" / NAME)
    values, again = list(own_state(student).values()), list(own_state(other).values())
    assert all(torch.equal(a, b) for a, b in zip(values, again, strict=True))


def test_what_comfyui_would_leave_out_or_scale_otherwise_is_told(product: Product, tmp_path: Path):
    """diffusers' own layout: attention of a UNet has another name there, and without an alpha the scale is 1."""
    export_lora(product, tmp_path / "out", "diffusers")
    found, student = load_file(tmp_path / "out" / NAME), product.net
    model: Any = diffusers_model(network_of(student.base))[1]  # type: ignore[attr-defined]
    part = component(model)
    weights = {k.replace(".base_layer.", "."): v for k, v in model.state_dict().items() if "lora_" not in k}
    if part == "unet":
        with pytest.raises(ValueError, match="ComfyUI's rule leaves out unet"):
            merged_by_comfyui(found, weights, part)
        return
    key = "transformer_blocks.0.attn.to_q"
    gap = merged_by_comfyui(found, weights, part)[f"{key}.weight"] - weights[f"{key}.weight"]
    sides = (found[f"transformer.{key}.lora_{s}.weight"] for s in "BA")
    torch.testing.assert_close(gap, torch.linalg.multi_dot(tuple(sides)), rtol=0, atol=1e-6)


def test_a_card_says_whose_adapter_it_is_and_comfyui_gets_its_graph(product: Product, tmp_path: Path):
    done = export_lora(product, tmp_path / "out", "comfyui")
    graph = json.loads((tmp_path / "out" / WORKFLOW).read_text())
    flow = any(node["class_type"] == "UNETLoader" for node in graph.values())
    levels = [float(v) for v in graph["10"]["inputs"]["sigmas"].split(",")]
    assert (levels[0] == 1.0) == flow
    assert len(levels) == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'pipeline_tag: "text-to-image"' in card.split("---")[1]
    assert "| guidance in its weights | 3 where 1 is none; of the teacher's pipeline guidance_scale=3 |" in card
    assert "ComfyUI itself was not run" in card
    assert "base" in json.loads((tmp_path / "out" / "fewstep.json").read_text())
    assert not (tmp_path / "plain" / WORKFLOW).exists()
    assert done.parity < 1e-5


def test_a_video_is_told_by_its_shape(tmp_path: Path):
    """SANA-Video's pipeline counts `frames`, Wan's `num_frames`."""
    source: Any = SimpleNamespace(root=tmp_path, shown=str(tmp_path), index={}, config={})
    wrapper: Any = SimpleNamespace(needs=("text",), image_channels=0)
    for shape, task in (((16, 2, 4, 8), "text-to-video"), ((16, 4, 8), "text-to-image")):
        product: Any = SimpleNamespace(shape=shape)
        assert _front(product, (source, wrapper, None))["pipeline_tag"] == task  # type: ignore[arg-type]


def test_an_adapter_of_another_base_is_refused_by_name(product: Product, tmp_path: Path):
    """In every layout, before a shape is looked at; the base's dtype does not matter."""
    student: Any = product.net
    for layout in ("diffusers", "comfyui"):
        export_lora(product, tmp_path / layout, layout)
        base = plain_copy(student.base).bfloat16()
        read_lora(Adapted(base, "again", rank=4, alpha=1.0, targets=student.targets), tmp_path / layout / NAME)
        with torch.no_grad():
            for p in base.parameters():
                p += 0.5
        other = Adapted(base, "other", rank=4, alpha=1.0, targets=student.targets)
        with pytest.raises(
            UserError, match=f"{layout}/{NAME}: is a LoRA of another base: .*; name its own base as teacher"
        ):
            read_lora(other, tmp_path / layout / NAME)


def test_only_adapters_have_layouts(product: Product, tmp_path: Path):
    from fewstep.commands.export import export_run

    for lora, layout, said in ((False, "kohya", "add --lora"), (True, "peft", "is not one of diffusers, kohya, comfyui")):
        with pytest.raises(UserError, match=said):
            export_run(tmp_path, None, False, lora, layout)
    with pytest.raises(UserError, match="--lora needs a student that is an adapter"):
        export_lora(replace(product, net=product.net.base), tmp_path / "out")  # type: ignore[attr-defined]


@pytest.mark.parametrize(("key", "value"), [("noise_scale", 0.45), ("dynamic", (0.3, 0.7))])
def test_an_adapter_has_no_scheduler_for_what_no_pipeline_does(
    product: Product, tmp_path: Path, key: str, value: Any
) -> None:
    changed: Any = {key: value}
    parts = lora_parts(replace(product, sampler=replace(product.sampler, **changed)))
    assert parts.scheduler == ""
    assert f"no scheduler: {key.replace('dynamic', 'dynamic guidance')}" in parts.usage("folder")
    assert lora_parts(product).scheduler
