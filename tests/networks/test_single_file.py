"""Files that are no folder, and folders whose weights are quantised: each is named, with what to give instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.config import UserError
from fewstep.networks.folder import read_folder
from fewstep.networks.weights import load_part, load_text_model

CASES = {
    "xl": (
        "conditioner.embedders.1.model.ln_final.weight",
        "StableDiffusionXLPipeline as P",
        "(here Stable Diffusion XL)",
    ),
    "sd3": ("model.diffusion_model.joint_blocks.0.x", "StableDiffusion3Pipeline as P", "(here Stable Diffusion 3)"),
    "sd1": ("model.diffusion_model.input_blocks.0.0.weight", "StableDiffusionPipeline as P", "Stable Diffusion 1 and 2"),
    "flux": (
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "FluxTransformer2DModel as M",
        "it holds a FluxTransformer2DModel alone",
    ),
    "flux2": ("single_stream_modulation.lin.weight", "Flux2Transformer2DModel as M", "a Flux2Transformer2DModel alone"),
    "chroma": (
        "distilled_guidance_layer.in_proj.bias double_blocks.0.img_attn.norm.key_norm.scale",
        "ChromaTransformer2DModel as M",
        "it holds a ChromaTransformer2DModel alone",
    ),
    "hunyuan": (
        "double_blocks.0.img_attn.norm.key_norm.scale txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",
        "HunyuanVideoTransformer3DModel as M",
        "it holds a HunyuanVideoTransformer3DModel alone",
    ),
    "lumina2": ("cap_embedder.0.weight", "Lumina2Transformer2DModel as M", "it holds a Lumina2Transformer2DModel alone"),
    "z_image": (
        "cap_embedder.0.weight layers.0.adaLN_modulation.0.weight",
        "ZImageTransformer2DModel as M",
        "it holds a ZImageTransformer2DModel alone",
    ),
    "unknown": (
        "double_blocks.0.other.weight",
        "PIPELINE as P",
        "(none that is known here has tensors of these names; put it in for PIPELINE)",
    ),
    "wan": ("model.diffusion_model.blocks.0.self_attn.q.weight", "WanTransformer3DModel as M", "hf download ORG/NAME"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_single_file_is_told_by_its_names_and_its_command_is_of_its_family(name: str, tmp_path: Path):
    key, code, said = CASES[name]
    file = tmp_path / f"{name}.safetensors"
    save_file({k: torch.zeros(1) for k in key.split()}, file)
    with pytest.raises(UserError) as caught:
        read_folder(str(file))
    told = str(caught.value)
    assert told.startswith(f"teacher {file}: is a single file, not a pipeline folder; ")
    assert code in told
    assert said in told
    assert told.count("\n") == 1  # the command has a line of its own


def test_a_gguf_is_named(tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        UserError, match=r"x\.gguf: is a GGUF, .*; give the folder of the pipeline .* dtype: bf16"
    ) as caught:
        read_folder(str(tmp_path / "x.gguf"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("method", "absent"), [("bitsandbytes", True), ("something", False)])
def test_quantised_weights_are_named_before_they_are_read(tmp_path: Path, method: str, absent: bool):
    config = {"_class_name": "SD3Transformer2DModel", "quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    part = tmp_path.name
    with pytest.raises(UserError, match=f"teacher T: the weights in {part}/ are quantised by {method}") as caught:
        load_part(tmp_path, "teacher T", "SD3Transformer2DModel")
    assert ("which is not installed" in str(caught.value)) == absent
    assert "give the folder of plain weights" in str(caught.value)
    with pytest.raises(UserError, match=r"encoder E: .* are quantised by"):
        load_text_model(tmp_path, "encoder E", torch.nn.Linear)
