"""LoRA files as other trainers write them start an adapter, or are refused by what they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_condition import condition_unet
from tiny_text import run_command
from torch import Tensor

from fewstep.config import UserError
from fewstep.networks.adapters import Adapted
from fewstep.networks.lora_file import NAME, PEFT_NAME, lora_tensors, read_lora, save_lora, with_lora

TARGETS = ("to_q", "to_out.0", "proj_in")


class Bare(torch.nn.Module):
    """Just enough of a denoiser for an adapter to find its network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.ModuleDict({"model": condition_unet()})


def adapter(**options: Any) -> Adapted:
    return Adapted(Bare(), "one", **{"rank": 2, "targets": TARGETS, **options})


def trained() -> dict[str, Tensor]:
    """What an adapter holds, as diffusers names it now: unet.LAYER.lora_A.weight."""
    one, g = adapter(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in one.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return lora_tensors(one)[0]


def written(rename: Callable[[str], str], tensors: Mapping[str, Tensor], file: Path, **header: Any) -> Path:
    told = {"lora_adapter_metadata": json.dumps(header)} if header else {}
    save_file({rename(k): v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt", **told})
    return file


def of_scripts(k: str) -> str:
    return k.replace("lora_A", "lora.down").replace("lora_B", "lora.up")


def of_processors(k: str) -> str:
    for layer, old in (("to_q", "processor.to_q_lora"), ("to_out.0", "processor.to_out_lora")):
        k = k.replace(f"{layer}.lora_A", f"{old}.down").replace(f"{layer}.lora_B", f"{old}.up")
    return of_scripts(k)


def of_kohya(k: str) -> str:
    layer, _, side = k.removeprefix("unet.").rpartition(".lora_")
    return f"lora_unet_{layer.replace('.', '_')}.lora_{ {'A': 'down', 'B': 'up'}[side[0]] }.weight"


LAYOUTS: dict[str, Callable[[str], str]] = {
    "diffusers": lambda k: k,
    "scripts": of_scripts,
    "processors": of_processors,
    "processors without unet": lambda k: of_processors(k).removeprefix("unet."),
    "linear layers": lambda k: k.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up"),
    "kohya": of_kohya,
    "peft": lambda k: k.replace("unet.", "base_model.model.", 1),
    "comfyui": lambda k: k.replace("unet.", "diffusion_model.", 1),
    "the other part": lambda k: k.replace("unet.", "transformer.", 1),
    "peft, adapter named": lambda k: k.replace("unet.", "base_model.model.", 1).replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_the_same_adapter(layout: str, tmp_path: Path):
    tensors, other = trained(), adapter()
    read_lora(other, written(LAYOUTS[layout], tensors, tmp_path / NAME))
    again = lora_tensors(other)[0]
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("layout", ["scripts", "processors", "kohya"])
def test_diffusers_reads_these_files_alike(layout: str, tmp_path: Path):
    """The layouts here are those that diffusers itself takes: its layers get the same tensors."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tensors = trained()
    written(LAYOUTS[layout], tensors, tmp_path / NAME)
    unet = condition_unet()
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.load_lora_weights(tmp_path)
    theirs = {k: p for k, p in unet.named_parameters() if "lora_" in k}
    assert len(theirs) == len(tensors)
    for key, value in tensors.items():
        layer = key.removeprefix("unet.").replace(".weight", ".default_0.weight")
        torch.testing.assert_close(theirs[layer], value, rtol=0, atol=0)


def refused(file: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_lora(adapter(**options), file)
    assert str(caught.value).startswith(f"{file}: ")
    return str(caught.value).removeprefix(f"{file}: ")


def test_alpha_is_the_files_own_whoever_says_it(tmp_path: Path):
    tensors = trained()
    layers = {of_kohya(k).partition(".")[0] for k in tensors}
    kohya = {of_kohya(k): v for k, v in tensors.items()}
    same = written(str, kohya | {f"{n}.alpha": torch.tensor(1.5) for n in layers}, tmp_path / "a.safetensors")
    assert refused(same) == "was trained with alpha 1.5, not 2.0; set lora.alpha to 1.5"
    read_lora(adapter(alpha=1.5), same)
    mixed = {f"{n}.alpha": torch.tensor(float(i % 2 + 1)) for i, n in enumerate(sorted(layers))}
    assert "its layers have different alphas" in refused(written(str, kohya | mixed, tmp_path / "b.safetensors"))
    silent = written(of_scripts, tensors, tmp_path / "c.safetensors")
    assert refused(silent, alpha=4.0) == (
        "names no alpha, which means that of its rank, alpha 2.0, not 4.0; set lora.alpha to 2.0"
    )
    written(LAYOUTS["peft"], tensors, tmp_path / PEFT_NAME)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8, "use_dora": False}))
    with pytest.raises(UserError, match=r"was trained with alpha 8.0, not 2.0"):
        read_lora(adapter(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "use_rslora": True}))
    with pytest.raises(UserError, match="was trained with use_rslora, which is not supported"):
        read_lora(adapter(), tmp_path)
    rs = written(str, tensors, tmp_path / "d.safetensors", **{"unet.lora_alpha": 2, "unet.use_dora": True})
    assert refused(rs).startswith("was trained with use_dora")


def test_a_text_encoders_part_is_named_and_its_command_leaves_it_out(tmp_path: Path):
    tensors = {of_scripts(k): v for k, v in trained().items()}
    words = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": torch.zeros(2, 4)}
    file = written(str, tensors | words, tmp_path / NAME)
    told = refused(file)
    assert told.startswith("also adapts a text encoder (text_encoder.text_model.encoder.layers.0.self_attn")
    run_command(told)
    read_lora(adapter(), file)
    joined = written(str, {"lora_te1_text_model_x.lora_down.weight": torch.zeros(2, 4)}, tmp_path / "k.safetensors")
    assert refused(joined).startswith("also adapts a text encoder (lora_te1_text_model_x.lora_down.weight, 1 tensors)")


def update_of(file: Path) -> dict[str, Tensor]:
    """What a LoRA file adds to each weight that it changes."""
    net = Bare()
    before, after = net.state_dict(), with_lora(net, file).state_dict()
    return {k: after[k] - before[k] for k in before if not torch.equal(after[k], before[k])}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-6) for k in a)


def test_the_command_without_the_text_encoder_keeps_alpha_and_base(tmp_path: Path):
    file = save_lora(adapter(alpha=8.0), tmp_path / NAME)
    with safe_open(file, "pt") as f:
        header = f.metadata()
    words = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 4)}
    tensors = load_file(file) | trained()
    save_file(tensors, tmp_path / "alone.safetensors", metadata=header)
    save_file(tensors | words, file, metadata=header)
    run_command(refused(file, alpha=8.0))
    with safe_open(file, "pt") as f:
        assert f.metadata() == header
        assert "fewstep_base" in header
    read_lora(adapter(alpha=8.0), file)
    assert same(update_of(file), update_of(tmp_path / "alone.safetensors"))


WRAPPED: list[tuple[str, Callable[[str], str]]] = [
    ("_orig_mod.", lambda k: k.replace("unet.", "unet._orig_mod.")),
    ("module.", lambda k: f"module.{k}"),
    ("module._orig_mod.", lambda k: f"module._orig_mod.{k.removeprefix('unet.')}"),
    ("_fsdp_wrapped_module.", lambda k: k.replace("unet.", "base_model.model._fsdp_wrapped_module.")),
    ("_orig_mod.", lambda k: k.replace("attentions.0.", "attentions.0._orig_mod.")),
    ("_orig_mod_", lambda k: of_kohya(k).replace("lora_unet_", "lora_unet__orig_mod_")),
]


@pytest.mark.parametrize(("mark", "rename"), WRAPPED)
def test_layers_named_as_inside_a_wrapper_get_the_command_that_takes_it_off(
    mark: str, rename: Callable[[str], str], tmp_path: Path
):
    tensors, other = trained(), adapter(alpha=8.0)
    file = written(rename, tensors, tmp_path / NAME, **{"unet.lora_alpha": 8})
    told = refused(file, alpha=8.0)
    assert told.startswith(f"its layers are named as inside a wrapper, with {mark!r} in ")
    with pytest.raises(UserError, match="its layers are named as inside a wrapper"):
        with_lora(Bare(), file)
    run_command(told)
    read_lora(other, file)
    again = lora_tensors(other)[0]
    assert all(torch.equal(again[k], tensors[k]) for k in tensors)
    plain = written(str, tensors, tmp_path / "plain.safetensors", **{"unet.lora_alpha": 8})
    assert same(update_of(file), update_of(plain))


@pytest.mark.parametrize("front", ["unet.", "transformer.", ""])
def test_a_header_tells_alpha_with_the_part_or_without(front: str, tmp_path: Path):
    """A model's own `save_lora_adapter` writes neither its tensors nor its alpha with a part before."""
    tensors = {k.replace("unet.", front, 1): v for k, v in trained().items()}
    file = written(str, tensors, tmp_path / NAME, **{f"{front}lora_alpha": 8})
    read_lora(adapter(alpha=8.0), file)
    assert refused(file) == "was trained with alpha 8.0, not 2.0; set lora.alpha to 8.0"
    twice = written(str, tensors, tmp_path / "b.safetensors", **{f"{front}lora_alpha": 4})
    assert same(update_of(file), {k: 2 * v for k, v in update_of(twice).items()})


def test_a_layer_without_alpha_has_its_rank_in_both_readers(tmp_path: Path):
    tensors = trained()
    kohya = {of_kohya(k): v for k, v in tensors.items()}
    layers = sorted({k.partition(".")[0] for k in kohya})
    alphas = {f"{n}.alpha": torch.tensor(8.0) for n in layers}
    del alphas[f"{layers[0]}.alpha"]
    file = written(str, kohya | alphas, tmp_path / "a.safetensors")
    told = refused(file, alpha=8.0)
    assert "its layers have different alphas (" in told
    assert " 2.0 (its rank, for it names none) and " in told
    said = written(str, kohya | alphas | {f"{layers[0]}.alpha": torch.tensor(2.0)}, tmp_path / "b.safetensors")
    assert same(update_of(file), update_of(said))
    rest = written(str, kohya | {k: torch.tensor(2.0) for k in list(alphas)[:1]}, tmp_path / "c.safetensors")
    read_lora(adapter(), rest)


def test_a_layer_in_two_layouts_is_refused_by_both_names(tmp_path: Path):
    tensors = trained()
    key = next(k for k in tensors if ".lora_A" in k)
    layer = key.removeprefix("unet.").partition(".lora_")[0]
    down = key.replace("lora_A", "lora.down")
    for other in (down, of_kohya(key), key.replace("unet.", "diffusion_model."), f"module.{key}"):
        file = written(str, tensors | {other: tensors[key] + 1}, tmp_path / NAME)
        told = refused(file)
        assert f"{layer} twice, as " in told
        assert key in told
        assert other in told
        with pytest.raises(UserError, match="twice, as "):
            with_lora(Bare(), file)


ODD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("alpha", torch.ones(4), {}, "has the shape [4]; an alpha is one number"),
    ("lora_A.weight", torch.zeros(0, 8), {}, "has the shape [0, 8]; a LoRA's tensors are [rank, inputs]"),
    ("lora_A.weight", torch.zeros(8), {}, "has the shape [8]; a LoRA's tensors are [rank, inputs]"),
    ("lora_A.weight", torch.zeros(2, 8).to(torch.float8_e4m3fn), {}, "is float8_e4m3fn; a LoRA's tensors are float32"),
    ("lora_A.weight", torch.zeros(2, 8, dtype=torch.int8), {}, "is int8; a LoRA's tensors are float32"),
    ("", None, {"unet.lora_alpha": "16x"}, "lora_adapter_metadata: unet.lora_alpha is '16x'; it must be a number"),
    ("", None, {"unet.lora_alpha": [16]}, "lora_adapter_metadata: unet.lora_alpha is [16]; it must be a number"),
    ("", None, {"lora_alpha": True}, "lora_adapter_metadata: lora_alpha is True; it must be a number"),
]


@pytest.mark.parametrize(("tail", "value", "header", "told"), ODD)
def test_odd_values_are_named_by_both_readers(tail: str, value: Any, header: dict[str, Any], told: str, tmp_path: Path):
    tensors = trained()
    layer = min(tensors).partition(".lora_")[0]
    file = written(str, tensors | ({f"{layer}.{tail}": value} if tail else {}), tmp_path / NAME, **header)
    told = f"{layer}.{tail} {told}" if tail else told
    assert refused(file).startswith(told)
    with pytest.raises(UserError) as caught:
        with_lora(Bare(), file)
    assert str(caught.value).startswith(f"{file}: {told}")


def test_files_that_say_too_little_are_named(tmp_path: Path):
    tensors = trained()
    assert refused(written(str, {}, tmp_path / NAME)).startswith("holds no tensors; a LoRA file has two for each layer")
    alone = written(str, {"lora_unet_x.alpha": torch.ones(())}, tmp_path / NAME)
    assert refused(alone).startswith("holds no layer of a LoRA that can be told; read are ")
    written(str, tensors, tmp_path / NAME, **{"unet.lora_alpha": None})
    written(str, tensors, tmp_path / "silent.safetensors")
    assert same(update_of(tmp_path / NAME), update_of(tmp_path / "silent.safetensors"))
    up = next(k for k in tensors if ".lora_B" in k)
    written(str, tensors | {up: torch.cat([tensors[up]] * 2, 1)}, tmp_path / NAME)
    with pytest.raises(UserError, match=r"is of rank 2 in lora_A .* and of another in lora_B"):
        with_lora(Bare(), tmp_path / NAME)
    written(LAYOUTS["peft"], tensors, tmp_path / PEFT_NAME)
    (tmp_path / NAME).unlink()
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"r": 2, "lora_alpha": "16x"}))
    for read in (lambda f: read_lora(adapter(), f), lambda f: with_lora(Bare(), f)):
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert str(caught.value) == f"{config}: lora_alpha is '16x'; it must be a number, such as 16"


def test_what_is_no_plain_lora_is_named(tmp_path: Path):
    tensors = trained()
    first = next(iter(tensors))
    layer = first.partition(".lora_")[0]
    file = tmp_path / NAME
    for extra, kind in (
        ("lora_magnitude_vector", "DoRA"),
        ("dora_scale", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
    ):
        told = refused(written(str, tensors | {f"{layer}.{extra}": torch.zeros(2)}, file))
        assert told == f"is no plain LoRA: {layer}.{extra} is of a {kind}; fuse it into the base model instead"
    told = refused(written(str, {**tensors, first: torch.full_like(tensors[first], float("nan"))}, file))
    assert told.startswith(f"holds NaN or infinity in {first} ({tensors[first].numel()} of")
    told = refused(written(str, {"conv.weight": torch.zeros(2, 2)}, file))
    assert told.startswith(
        "holds no layer of a LoRA that can be told, but unet.conv.weight; read are diffusers (unet.LAYER"
    )
    told = refused(written(lambda k: k.replace("to_q", "to_z"), tensors, file))
    assert "set lora.targets to the layers of the file (proj_in, to_out, to_z)" in told
