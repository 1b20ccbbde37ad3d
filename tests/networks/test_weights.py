"""Weights saved from within a wrapper, or with NaN in them, are refused by the words that mend them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_teacher import make_teacher
from tiny_text import run_command

from fewstep.commands.check_teacher import check_teacher
from fewstep.config import UserError
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.weights import not_finite
from fewstep.networks.wrapped import wrapping

SAFE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make_teacher(tmp_path / "T") / "unet" / SAFE


def inner(key: str) -> str:
    """One block of several compiled."""
    head, _, rest = key.partition(".")
    return f"{head}._orig_mod.{rest}" if head == "mid_block" else key


WRAPPED: list[tuple[str, Any, str]] = [
    ("_orig_mod.", "_orig_mod.{}".format, "torch.compile puts it there"),
    ("module.", "module.{}".format, "DataParallel and DistributedDataParallel put it there"),
    ("module._orig_mod.", "module._orig_mod.{}".format, "torch.compile"),
    ("_fsdp_wrapped_module.", "_fsdp_wrapped_module.{}".format, "FSDP puts it there"),
    ("_orig_mod.", inner, "torch.compile puts it there"),
    ("ema_model.", "ema_model.{}".format, "some trainers save it so"),
    ("state.net.", "state.net.{}".format, "some trainers save it so"),
]


@pytest.mark.parametrize(("mark", "rename", "why"), WRAPPED)
def test_a_wrapper_is_named_and_its_command_takes_it_off(file: Path, mark: str, rename: Any, why: str):
    weights = load_file(file)
    save_file({rename(k): v for k, v in weights.items()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_denoiser(str(file.parents[1]), 10)
    said, _, _ = str(caught.value).partition("\n")
    parts = {p for p in mark.split(".") if p}
    named = said.partition("named as inside a wrapper, with '")[2].partition("'")[0]
    assert {p for p in named.split(".") if p} == parts
    assert why in said
    run_command(str(caught.value))
    again = load_file(file)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[k], weights[k]) for k in weights)


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_denoiser(str(file.parents[1]), 10)
    return str(caught.value)


COPIES: list[tuple[str, Any, str, Any]] = [
    ("", str, "ema.", "ema.{}".format),
    ("", str, "_orig_mod.", "_orig_mod.{}".format),
    ("_orig_mod.", "_orig_mod.{}".format, "ema.", "ema.{}".format),
    ("module.", "module.{}".format, "module._orig_mod.", "module._orig_mod.{}".format),
]


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize(("mark", "rename", "other", "rename_other"), COPIES)
def test_of_two_sets_in_one_file_none_is_taken_by_guess(
    file: Path, mark: str, rename: Any, other: str, rename_other: Any, kept: int
):
    weights = load_file(file)
    both = {rename(k): v for k, v in weights.items()} | {rename_other(k): v + 1 for k, v in weights.items()}
    save_file(both, file, metadata={"format": "pt", "mine": "kept"})
    said, *lines = refusal(file).splitlines()
    first, second = (f"{m}class_embedding.weight" for m in sorted((mark, other)))
    assert f"are there 2 times: class_embedding.weight as {first} and as {second}, and no key says which counts." in said
    commands = dict(zip(lines[::2], lines[1::2], strict=True))
    marks = [f"  # keeps {f'those with {m!r}' if m else 'those under their own names'}" for m in (mark, other)]
    assert set(commands) == set(marks)
    assert all(torch.equal(v, both[k]) for k, v in load_file(file).items())
    run_command(commands[marks[kept]])
    again = load_file(file)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[k], weights[k] + kept) for k in weights)
    with safe_open(file, "pt") as f:
        assert f.metadata() == {"format": "pt", "mine": "kept"}
    assert load_denoiser(str(file.parents[1]), 10).prediction == "cm"


def test_a_copy_that_is_not_whole_is_not_offered(file: Path):
    weights = load_file(file)
    part = {f"_orig_mod.{k}": v + 1 for k, v in weights.items() if not k.startswith("conv_out")}
    save_file(weights | part, file, metadata={"format": "pt"})
    told = refusal(file)
    assert told.count("python -c") == 1
    run_command(told)
    again = load_file(file)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[k], weights[k]) for k in weights)


def test_a_prefix_of_one_block_alone_leaves_the_others_in_the_file(file: Path):
    weights = load_file(file)
    save_file({f"net.{k}" if k.startswith("mid") else k: v for k, v in weights.items()}, file, metadata={"format": "pt"})
    run_command(refusal(file))
    assert load_file(file).keys() == weights.keys()


def sharded(folder: Path) -> tuple[Path, list[Path]]:
    """(index, shards) of a teacher whose network is saved in several."""
    unet = make_teacher(folder) / "unet"
    load_denoiser(str(folder), 10).net.model.save_pretrained(unet, max_shard_size="10KB")
    (unet / SAFE).unlink(missing_ok=True)
    return unet / f"{SAFE}.index.json", sorted(unet.glob("*.safetensors"))


MUST = 'it must hold {"metadata": {}, "weight_map": {TENSOR: SHARD, ...}}: copy it from the original folder'


def test_an_index_of_shards_is_believed_or_refused_by_name(tmp_path: Path):
    index, shards = sharded(tmp_path / "T")
    load_denoiser(str(tmp_path / "T"), 10)
    was = json.loads(index.read_text())
    begin = f"teacher {tmp_path / 'T'}: "
    for told, said in (
        ({"weight_map": was["weight_map"]}, f"unet/{index.name}: lacks metadata; {MUST}"),
        ({"metadata": {}}, f"unet/{index.name}: weight_map names no shard of any tensor; {MUST}"),
        (was | {"weight_map": {}}, f"unet/{index.name}: weight_map names no shard of any tensor; {MUST}"),
        (was | {"weight_map": ["a"]}, f"unet/{index.name}: weight_map names no shard of any tensor; {MUST}"),
        ([], f"{index}: expected a JSON object; {MUST}"),
    ):
        index.write_text(json.dumps(told))
        assert refusal(index) == begin + said
    index.write_text("")
    assert refusal(index).endswith(MUST)
    assert refusal(index).startswith(f"{begin}{index}: cannot be read as JSON")
    index.write_text(json.dumps(was))
    extra = load_file(shards[-1])
    other = next(k for k, f in was["weight_map"].items() if f == shards[0].name)
    save_file(extra | {other: load_file(shards[0])[other] + 1}, shards[-1], metadata={"format": "pt"})
    assert refusal(index) == (
        f"{begin}unet/{shards[-1].name} holds {other}, which {index.name} says is in {shards[0].name}; the shards are of "
        "two saves: copy them and the index from one folder"
    )
    save_file(extra, shards[-1], metadata={"format": "pt"})
    load_denoiser(str(tmp_path / "T"), 10)
    index.unlink()
    assert refusal(index) == (
        f"{begin}unet/{shards[0].name} is one of {len(shards)} shards, and {index.name}, which says what each of them "
        "holds, is missing; copy it from the original folder"
    )
    index.write_text(json.dumps(was))
    shards[1].unlink()
    assert f"is in {shards[1].name}, which is not in unet/; copy it from the original folder" in refusal(index)


@pytest.mark.parametrize(("mark", "rename", "why"), WRAPPED)
def test_the_command_for_shards_writes_their_index_too(tmp_path: Path, mark: str, rename: Any, why: str):
    del mark, why
    weights = load_file(make_teacher(tmp_path / "P") / "unet" / SAFE)
    index, shards = sharded(tmp_path / "T")
    assert len(shards) > 2
    for shard in shards:
        save_file({rename(k): v for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
    was = json.loads(index.read_text())
    index.write_text(json.dumps(was | {"weight_map": {rename(k): v for k, v in was["weight_map"].items()}}))
    run_command(refusal(index))
    assert json.loads(index.read_text()) == was
    again = dict(load_denoiser(str(tmp_path / "T"), 10).net.model.state_dict())
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[k], weights[k]) for k in weights)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.non_ema.safetensors", "model.safetensors"])
def test_a_file_of_another_name_is_told_to_be_renamed(file: Path, name: str):
    other = file.rename(file.with_name(name))
    with pytest.raises(UserError) as caught:
        load_denoiser(str(file.parents[1]), 10)
    said, _, command = str(caught.value).partition("\n")
    assert said.endswith(f"unet/ has {name}, and no {SAFE}, which diffusers looks for; rename it if it is meant:")
    assert command.split() == ["mv", str(other), str(file)]


def test_other_names_are_no_wrapper():
    assert wrapping(["other.weight"], ["conv.weight"]) is None
    assert wrapping(["module.conv.bias"], ["conv.weight"]) is None
    assert wrapping(["down.extra"], []) is None
    assert wrapping(["a.conv.weight", "b.norm.weight"], ["conv.weight", "norm.weight"]) is None


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named(file: Path, value: float):
    weights = load_file(file)
    weights["mid_block.resnets.0.conv1.weight"][0, 0] = value
    save_file(weights, file, metadata={"format": "pt"})
    folder = str(file.parents[1])
    said = "the weights in unet/ hold NaN or infinity in mid_block.resnets.0.conv1.weight (9 of 2304 values)"
    with pytest.raises(UserError, match="T: the weights in unet/ hold NaN or infinity") as caught:
        load_denoiser(folder, 10)
    assert said in str(caught.value)
    report = check_teacher(folder, classes=10)
    assert not report.ok
    assert report.verdict().startswith(f"{folder} cannot be distilled: teacher {folder}: {said}")


def test_what_does_not_fit_into_half_precision_is_named(file: Path):
    weights = copy.deepcopy(load_file(file))
    weights["conv_in.weight"][0] = 7e4
    save_file(weights, file, metadata={"format": "pt"})
    assert load_denoiser(str(file.parents[1]), 10).prediction == "cm"
    with pytest.raises(UserError, match=r"conv_in.weight \(9 of 72 values\).*or they do not fit into float16: use bf16"):
        load_denoiser(str(file.parents[1]), 10, dtype="fp16")


def test_not_finite_looks_at_floating_point_alone():
    assert not_finite([("a", torch.ones(3)), ("b", torch.tensor([2]))]) is None
    assert not_finite([("a", torch.ones(3)), ("b", torch.tensor([1.0, float("inf")]))]) == "b (1 of 2 values)"
