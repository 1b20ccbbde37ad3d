"""A folder that cannot be used is refused before anything is trained, with a remedy that works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import make_pipeline, unet_condition
from tiny_teacher import edit_json
from tiny_text import pickle_weights, run_command, text_pipeline

from fewstep.commands.check_teacher import check_teacher
from fewstep.config import UserError
from fewstep.export.stock import open_stock
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.folder import number, read_folder, read_latents
from fewstep.networks.scheduler import read_scheduler
from fewstep.networks.weights import load_part

SAFE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("damaged")
    return {name: make_pipeline(root / name, name) for name in ("sd15", "dit")}


@pytest.fixture
def sd15(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["sd15"], tmp_path / "T"))


def refusal(call: Any, *args: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **more)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["MyPipeline", "UNet2DConditionModel", "__doc__", None, 3])
def test_a_class_that_is_no_pipeline_is_refused_before_training(sd15: Path, kind: Any):
    index = sd15 / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": kind}))
    told = refusal(load_denoiser, str(sd15))
    assert told == (
        f"{index}: _class_name {kind!r} is no pipeline of diffusers, and an export is one; write the class that the "
        "folder was made for, such as 'StableDiffusionPipeline'"
    )
    assert refusal(check_teacher, str(sd15)) == told
    edit_json(index, _class_name="StableDiffusionPipeline")
    assert load_denoiser(str(sd15)).prediction == "eps"


def test_a_pipeline_that_lacks_a_part_it_calls_is_a_finding(folders: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(folders["dit"], tmp_path / "T"))
    edit_json(folder / "model_index.json", vae=[None, None])
    report = check_teacher(str(folder))
    last = next(f for f in report.findings if f.name == "samples")
    assert last.ok is False
    assert last.said.startswith("the pipeline itself fails: 'NoneType' object has no attribute")


def test_what_the_index_names_is_there_before_training(sd15: Path):
    index = sd15 / "model_index.json"
    edit_json(index, text_encoder=["transformers", "CLIPTextModel"])
    assert load_denoiser(str(sd15)).net.pixels == 2  # cached embeddings need no encoder
    shutil.rmtree(sd15 / "vae")
    assert refusal(load_denoiser, str(sd15)) == (
        f"teacher {sd15}: vae/ is missing, and model_index.json names it (AutoencoderKL); copy it from the original "
        "pipeline"
    )


def test_the_wrapper_of_ones_own_reads_a_pickle_as_it_likes(sd15: Path, tmp_path: Path):
    pickle_weights(sd15 / "unet" / SAFE, "mine.pth")
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom diffusers import UNet2DConditionModel\n"
        "from fewstep.networks.wrappers.unet_condition import UNetCondition\n\n\n"
        "class Mine(UNetCondition):\n    @classmethod\n    def load(cls, folder):\n"
        "        config = UNet2DConditionModel.load_config(folder.root / 'unet')\n"
        "        net = UNet2DConditionModel.from_config(config)\n"
        "        net.load_state_dict(torch.load(folder.root / 'unet' / 'mine.pth', weights_only=True))\n"
        "        return net.eval()\n"
    )
    assert load_denoiser(str(sd15), wrapper=f"{tmp_path}/mine.py:Mine").prediction == "eps"


PICKLED = [
    ("unet", "diffusion_pytorch_model.bin", {}),
    ("unet", "diffusion_pytorch_model.fp16.bin", {}),
    ("unet", "model.ckpt", {"global_step": 3}),
    ("unet", "weights.pth", {}),
    ("vae", "diffusion_pytorch_model.bin", {}),
    ("vae", "diffusion_pytorch_model.fp16.bin", {}),
    ("vae", "vae.pt", {}),
]


@pytest.mark.parametrize(("part", "name", "wrapped"), PICKLED, ids=[f"{p}-{n}" for p, n, _ in PICKLED])
def test_the_conversion_command_of_each_pickle_works(sd15: Path, part: str, name: str, wrapped: Any):
    before = load_file(sd15 / part / SAFE)
    pickle_weights(sd15 / part / SAFE, name, **wrapped)
    (sd15 / part / "training_args.bin").write_bytes(b"no weights")
    said = f"teacher {sd15}: {part}/ has no .safetensors file; {name} is a pickle: convert it with safetensors first:\n"
    told = refusal(check_teacher, str(sd15))
    assert told.startswith(f"{said}  python -c ")
    assert refusal(load_denoiser, str(sd15)) == told
    with pytest.raises((OSError, UserError)):
        open_stock(sd15)
    run_command(told)
    after = load_file(sd15 / part / SAFE)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert load_denoiser(str(sd15)).prediction == "eps"
    assert type(open_stock(sd15)).__name__ == "StableDiffusionPipeline"


def test_sharded_pickles_and_classes_without_single_files_convert(folders: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(folders["dit"], tmp_path / "T's $1"))
    sub = folder / "transformer"
    before = load_file(sub / SAFE)
    names = sorted(before)
    parts = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, keys in parts.items():
        torch.save({k: before[k] for k in keys}, sub / file)
    where = {k: file for file, keys in parts.items() for k in keys}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (sub / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps(index))
    (sub / SAFE).unlink()
    told = refusal(load_denoiser, str(folder))
    assert "diffusion_pytorch_model-00001-of-00002.bin is a pickle" in told
    run_command(told)
    assert load_denoiser(str(folder)).prediction == "eps"
    for file in [*sub.glob("*.bin"), sub / "diffusion_pytorch_model.bin.index.json"]:
        file.unlink()
    pickle_weights(sub / SAFE, "model.ckpt", epoch=1)  # DiT has no from_single_file
    run_command(refusal(load_denoiser, str(folder)))
    after = load_file(sub / SAFE)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert load_denoiser(str(folder)).prediction == "eps"


def test_a_pickled_safety_checker_is_refused_with_its_command(sd15: Path):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size": 8, "patch_size": 4, "projection_dim": 6}
    config = CLIPConfig(text_config=small | {"vocab_size": 9}, vision_config=vision, projection_dim=6)
    checker = StableDiffusionSafetyChecker(config)
    checker.save_pretrained(sd15 / "safety_checker")
    edit_json(sd15 / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert load_denoiser(str(sd15)).prediction == "eps"
    pickle_weights(sd15 / "safety_checker" / "model.safetensors", "pytorch_model.bin")
    told = refusal(load_denoiser, str(sd15))
    assert "safety_checker/ has no .safetensors file; pytorch_model.bin is a pickle" in told
    run_command(told)
    assert load_denoiser(str(sd15)).prediction == "eps"


def test_a_single_file_is_named_and_its_command_makes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # from_single_file takes the configs of Stable Diffusion's repository: here a cache with tiny ones stands for it.
    hub = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("a" * 40)
    unet = unet_condition()
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = diffusers.AutoencoderTiny(**widths, **blocks)
    snapshot = text_pipeline(hub / "snapshots" / ("a" * 40), ["a red square"], unet=unet, vae=vae)
    # A real checkpoint brings the text encoder; here it is the repository's, under the name that is looked for.
    shutil.copy(snapshot / "text_encoder" / "model.safetensors", snapshot / "text_encoder" / SAFE)
    shutil.rmtree(snapshot / "unet")
    unet.save_config(snapshot / "unet")
    file = tmp_path / "old.ckpt"
    torch.save({"state_dict": unet.state_dict()}, file)
    told = refusal(read_folder, str(file))
    assert told.startswith(
        f"teacher {file}: is a single file, not a pipeline folder; write it as one with the pipeline class of its family "
        f"(a pickle is not opened; this is that of Stable Diffusion 1 and 2), then give {tmp_path}/old:\n  python -c "
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run_command(told)
    made: Any = load_denoiser(str(tmp_path / "old"))
    assert all(torch.equal(v, unet.state_dict()[k]) for k, v in made.net.model.state_dict().items())


def test_half_precision_alone_is_refused_with_a_command(sd15: Path):
    file = sd15 / "vae" / SAFE
    file.rename(sd15 / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    (sd15 / "unet" / SAFE).rename(sd15 / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    told = refusal(load_denoiser, str(sd15))
    assert told.startswith(
        f"teacher {sd15}: vae/ has diffusion_pytorch_model.fp16.safetensors and no plain weights, which an exported "
        "pipeline looks for; write them:\n  python -c "
    )
    run_command(told)
    # The network's own are read as they are: an export writes it anew.
    assert check_teacher(str(sd15)).ok


def test_a_part_is_whole_and_of_a_known_class(sd15: Path):
    sub = sd15 / "vae"
    weights = load_file(sub / SAFE)
    del weights["encoder.conv_in.bias"]
    save_file(weights, sub / SAFE, metadata={"format": "pt"})
    assert refusal(load_part, sub, "vae V", "AutoencoderKL").startswith(
        "vae V: the weights in vae/ lack encoder.conv_in.bias (1 in all); they are of another network than vae/config"
    )
    assert refusal(load_part, sub, "vae V", "AutoencoderX") == (
        f"{sub / 'config.json'}: diffusers has no class 'AutoencoderX'"
    )
    (sub / SAFE).unlink()
    assert refusal(load_part, sub, "vae V", "AutoencoderKL") == "vae V: vae/ has no .safetensors file"


FLOW: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
VP: dict[str, Any] = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}
SOLVER: dict[str, Any] = {
    "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
}  # fmt: skip
DYNAMIC = FLOW | {"use_dynamic_shifting": True}
NUMBERS = [
    (FLOW | {"shift": None}, "shift is null; it must be a positive number"),
    (FLOW | {"shift": "3"}, 'shift is "3"; it must be a positive number'),
    (FLOW | {"shift": 0}, "shift is 0; it must be a positive number"),
    (FLOW | {"shift": True}, "shift is true; it must be a positive number"),
    (FLOW | {"shift": float("nan")}, "shift is NaN; it must be a positive number"),
    (FLOW | {"num_train_timesteps": None}, "num_train_timesteps is null; it must be a positive whole number"),
    (SOLVER | {"flow_shift": []}, "flow_shift is []; it must be a positive number"),
    (VP | {"num_train_timesteps": None}, "num_train_timesteps is null; it must be a positive whole number"),
    (VP | {"num_train_timesteps": 99.5}, "num_train_timesteps is 99.5; it must be a positive whole number"),
    (VP | {"beta_start": "x"}, 'beta_start is "x"; it must be a positive number'),
    (VP | {"beta_end": 1.5}, "beta_end is 1.5; it must be below 1"),
    ({"_class_name": "EDMEulerScheduler", "rho": None}, "rho is null; it must be a positive number"),
    (DYNAMIC | {"base_shift": None}, "base_shift is null; it must be a number"),
    (DYNAMIC | {"max_image_seq_len": 256}, "base_image_seq_len is 256; it must be below max_image_seq_len 256"),
    (DYNAMIC | {"time_shift_type": "linear", "base_shift": -2}, "base_shift and max_shift give the shift -"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), NUMBERS)
def test_a_field_of_the_scheduler_that_is_no_number_is_named(config: Any, message: str):
    told = refusal(read_scheduler, config, "s.json", tokens=300)
    assert told.startswith(f"s.json: {message}")


def test_numbers_of_a_config(tmp_path: Path):
    assert number({"a": 3}, "a", 1.0, "f") == 3.0
    assert number({}, "a", 1.5, "f") == 1.5
    assert number({"a": -2}, "a", 1.0, "f", positive=False) == -2.0
    file = tmp_path / "config.json"
    for change, said in (
        ({"latent_channels": None}, "latent_channels is null; it must be a positive whole number"),
        ({"shift_factor": "x"}, 'shift_factor is "x"; it must be a number'),
        ({"scaling_factor": -1}, "scaling_factor is -1; it must be a positive number"),
    ):
        file.write_text(json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [1, 2]} | change))
        assert refusal(read_latents, file).startswith(f"{file}: {said}")
    file.write_text(json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [1, 2], "shift_factor": None}))
    assert read_latents(file) is not None
