"""Damaged encoder and VAE folders are named with a remedy that works; size conditions are the folder's own."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    IFPipeline,
    PixArtSigmaPipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file
from tiny_pipelines import SD_BETAS, unet_condition, vae
from tiny_text import pickle_weights, run_command, text_pipeline, word_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModelWithProjection

from fewstep.config import UserError
from fewstep.data import encoders as module
from fewstep.data.encoders import PipelineEncoder, SentenceEncoder
from fewstep.data.latents import Encoder, decoder, vae_hash
from fewstep.data.placed import encoding
from fewstep.data.text import embed

PROMPTS = ("a red square", "two green dots")
SAFE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pipeline(tmp_path_factory.mktemp("encoders") / "sd", PROMPTS)


@pytest.fixture
def sd(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "T"))


def refusal(call: Any, *args: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **more)
    return str(caught.value)


def told_of(folder: Path) -> str:
    return refusal(embed, PipelineEncoder(path=str(folder)), PROMPTS, cache=str(folder.parent / "cache"))


def set_index(folder: Path, **entries: Any) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | entries))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.fp16.bin", "model.ckpt"])
def test_a_pickled_text_encoder_is_refused_and_its_command_works(sd: Path, name: str):
    file = sd / "text_encoder" / "model.safetensors"
    before = embed(PipelineEncoder(path=str(sd)), PROMPTS, cache=str(sd.parent / "first"))
    pickle_weights(file, name)
    told = told_of(sd)
    assert told.startswith(
        f"encoder {sd}: text_encoder/ has no .safetensors file; {name} is a pickle: convert it with safetensors first:\n"
    )
    run_command(told)
    after = embed(PipelineEncoder(path=str(sd)), PROMPTS, cache=str(sd.parent / "cache"))
    k = torch.arange(2)
    assert torch.equal(after.take(k)["text"], before.take(k)["text"])


def test_half_precision_alone_is_refused_and_its_command_works(sd: Path):
    file = sd / "text_encoder" / "model.safetensors"
    file.rename(file.with_name("model.fp16.safetensors"))
    told = told_of(sd)
    assert told.startswith(f"encoder {sd}: text_encoder/ has model.fp16.safetensors and no plain weights, which")
    run_command(told)
    assert len(embed(PipelineEncoder(path=str(sd)), PROMPTS, cache=str(sd.parent / "cache"))) == 2


def test_damaged_encoder_folders_are_named(sd: Path):
    file = sd / "text_encoder" / "model.safetensors"
    whole, index = file.read_bytes(), (sd / "model_index.json").read_text()
    file.write_bytes(whole[:300])
    assert told_of(sd).startswith(f"encoder {sd}: text_encoder/model.safetensors is truncated or damaged (300 bytes): ")
    file.write_bytes(whole)
    weights = load_file(file)
    lost = next(k for k in weights if k.endswith("final_layer_norm.weight"))
    save_file({k: v for k, v in weights.items() if k != lost}, file, metadata={"format": "pt"})
    assert told_of(sd).startswith(f"encoder {sd}: the weights in text_encoder/ lack ")
    file.write_bytes(whole)
    (sd / "model_index.json").write_text("{")
    assert told_of(sd).startswith(f"{sd}/model_index.json: cannot be read as JSON: Expecting property name")
    (sd / "model_index.json").write_text(index)
    set_index(sd, _class_name="MyPipeline")
    assert told_of(sd).startswith(
        f"{sd}/model_index.json: _class_name 'MyPipeline' is not known as an encoder; known: StableDiffusionPipeline, "
    )
    (sd / "model_index.json").write_text(index)
    set_index(sd, text_encoder=["mine", "CLIPTextModel"])
    assert told_of(sd) == (f"{sd}/model_index.json: text encoder ['mine', 'CLIPTextModel'] is no class of transformers")
    set_index(sd, text_encoder=[None, None])
    assert told_of(sd) == (
        f"encoder {sd}: model_index.json has no text_encoder ([null, null]), so this folder cannot encode prompts; name "
        "one that has it, such as the original pipeline"
    )
    (sd / "model_index.json").write_text(index)
    (sd / "tokenizer").rename(sd / "away")
    assert told_of(sd).startswith(f"encoder {sd}: tokenizer is missing; a folder that save_pretrained wrote has")
    (sd / "away").rename(sd / "tokenizer")
    (sd / "text_encoder").rename(sd / "away")
    assert told_of(sd).startswith(f"encoder {sd}: text_encoder is missing; ")
    (sd / "away").rename(sd / "text_encoder")
    assert len(embed(PipelineEncoder(path=str(sd)), PROMPTS, cache=str(sd.parent / "cache"))) == 2


def test_without_transformers_the_extra_is_named(sd: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert told_of(sd) == "encoder pipeline: needs transformers: pip install 'fewstep[text]'"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion XL without its first text encoder, which it may lack."""
    folder = tmp_path_factory.mktemp("xl") / "sdxl"
    tokenizer = word_tokenizer(PROMPTS, 9)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    ids = {"eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 0, "projection_dim": 10}
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=9, **ids, **sizes)
    unet = unet_condition(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=34
    )
    StableDiffusionXLPipeline(
        vae=vae(4, scaling_factor=0.13025), text_encoder=None, tokenizer=None, tokenizer_2=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config), unet=unet, add_watermarker=False,
        scheduler=EulerDiscreteScheduler(**SD_BETAS),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_size_conditions_are_height_and_width_in_pixels(sdxl: Path, tmp_path: Path):
    rows = embed(PipelineEncoder(path=str(sdxl)), PROMPTS, cache=str(tmp_path)).take(torch.arange(2))
    # The UNet is made for 8 x 12 latents, of 2 pixels each.
    assert rows["time_ids"].tolist() == [[16.0, 24.0, 0.0, 0.0, 16.0, 24.0]] * 2
    assert rows["text"].shape == (2, 9, 12)
    assert rows["pooled"].shape == (2, 10)


def test_guidance_moves_away_from_what_the_folder_says(sdxl: Path, tmp_path: Path):
    folder = Path(shutil.copytree(sdxl, tmp_path / "T"))
    index = json.loads((folder / "model_index.json").read_text())
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, vae=None, unet=None)

    def away(told: bool | None, **options: Any) -> dict[str, torch.Tensor]:
        """What is put in a prompt's place; `told`: the folder's force_zeros_for_empty_prompt, None is not there."""
        own = {k: v for k, v in index.items() if k != "force_zeros_for_empty_prompt"}
        more = {} if told is None else {"force_zeros_for_empty_prompt": told}
        (folder / "model_index.json").write_text(json.dumps(own | more))
        text = embed(PipelineEncoder(path=str(folder)), PROMPTS, cache=str(tmp_path / "cache"), **options)
        return text.null(text.take(torch.arange(1)))

    def theirs(told: bool, negative: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        pipe.register_to_config(force_zeros_for_empty_prompt=told)
        _, text, _, pooled = pipe.encode_prompt(PROMPTS[0], negative_prompt=negative, do_classifier_free_guidance=True)
        return text, pooled

    for told in (True, False, None):
        ours, (text, pooled) = away(told), theirs(told is not False)
        torch.testing.assert_close(ours["text"], text, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours["pooled"], pooled, rtol=0, atol=1e-6)
        assert bool((text == 0).all()) == (told is not False)
    text, _ = theirs(True, PROMPTS[1])
    torch.testing.assert_close(away(True, negative=PROMPTS[1])["text"], text, rtol=0, atol=1e-6)
    assert bool(away(True, zeros=False)["text"].any())
    assert not bool(away(False, zeros=True)["text"].any())


def test_a_second_encoder_or_a_vae_that_is_not_there_is_named(sdxl: Path, tmp_path: Path):
    folder = Path(shutil.copytree(sdxl, tmp_path / "T"))
    shutil.rmtree(folder / "vae")
    assert told_of(folder) == (
        f"encoder {folder}: vae/config.json is missing, on which SDXL's size conditions depend; copy it from the original"
    )
    shutil.rmtree(folder / "text_encoder_2")
    assert told_of(folder).startswith(f"encoder {folder}: text_encoder_2 is missing; ")
    set_index(folder, text_encoder_2=[None, None])
    assert "model_index.json has no text_encoder_2 ([null, null])" in told_of(folder)


def test_a_sentence_encoder_is_whole_or_refused(tmp_path: Path):
    folder = tmp_path / "S"
    tokenizer = word_tokenizer(PROMPTS, 9)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    encoder, file = SentenceEncoder(path=str(folder), length=5), folder / "model.safetensors"
    whole = load_file(file)
    want = encoder.open()(PROMPTS)["text"]
    no_pooler = {k: v for k, v in whole.items() if not k.startswith("pooler.")}
    save_file(no_pooler, file, metadata={"format": "pt"})
    assert torch.equal(encoder.open()(PROMPTS)["text"], want)
    lost = "encoder.layer.0.output.dense.weight"
    save_file({k: v for k, v in whole.items() if k != lost}, file, metadata={"format": "pt"})
    assert refusal(encoder.open).startswith(
        f"encoder {folder}: the weights in S/ lack {lost} (1 in all); they are of another network than S/config.json"
    )
    save_file(whole, file, metadata={"format": "pt"})
    pickle_weights(file, "pytorch_model.bin")
    told = refusal(encoder.open)
    assert told.startswith(f"encoder {folder}: S/ has no .safetensors file; pytorch_model.bin is a pickle: ")
    run_command(told)
    assert torch.equal(encoder.open()(PROMPTS)["text"], want)
    (folder / "tokenizer.json").write_text("{")
    assert refusal(encoder.open).startswith(f"encoder {folder}: its tokenizer cannot be loaded: ")


@pytest.fixture
def coder(tmp_path: Path) -> Path:
    """A pipeline folder of a VAE alone."""
    vae(4, scaling_factor=0.5, shift_factor=0.25).save_pretrained(tmp_path / "P" / "vae")
    return tmp_path / "P"


def test_a_vae_is_taken_only_as_the_teacher_takes_it(coder: Path):
    config, file = coder / "vae" / "config.json", coder / "vae" / SAFE
    plain, whole = config.read_text(), load_file(file)
    model: Any = AutoencoderKL.from_pretrained(coder / "vae")
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = (model.encode(x).latent_dist.mean - 0.25) * 0.5
    torch.testing.assert_close(Encoder(str(coder))(x)[0], want, rtol=0, atol=1e-6)
    by_channel = {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0, 4.0, 0.5, 1.0]}
    config.write_text(json.dumps(json.loads(plain) | by_channel))
    mean, std = (torch.tensor(by_channel[f"latents_{k}"]).view(1, 4, 1, 1) for k in ("mean", "std"))
    # Playground's, whose pipeline divides by the deviation and multiplies by the factor.
    torch.testing.assert_close(Encoder(str(coder))(x)[0], (want / 0.5 + 0.25 - mean) * 0.5 / std, rtol=0, atol=1e-6)
    z = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        picture = model.decode(z * std / 0.5 + mean).sample
    torch.testing.assert_close(decoder(str(coder))(z), picture, rtol=0, atol=1e-5)
    for open_it in (Encoder, decoder):
        for key, other in (("latents_mean", "latents_std"), ("latents_std", "latents_mean")):
            config.write_text(json.dumps(json.loads(plain) | {key: by_channel[key]}))
            assert refusal(open_it, str(coder)).startswith(f"{config}: {other} is missing; give both latents_mean and")
        config.write_text(json.dumps(json.loads(plain) | by_channel | {"latents_std": [0.0] * 4}))
        assert refusal(open_it, str(coder)).startswith(f"{config}: latents_std is 0.0; it must be a positive number")
        config.write_text(plain)
        lost = {k: v for k, v in whole.items() if k != "encoder.conv_in.bias"}
        save_file(lost, file, metadata={"format": "pt"})
        assert refusal(open_it, str(coder)).startswith(
            f"vae {coder}: the weights in vae/ lack encoder.conv_in.bias (1 in all); they are of another network"
        )
        save_file(whole, file, metadata={"format": "pt"})
        data = file.read_bytes()
        file.write_bytes(data[:500])
        assert refusal(open_it, str(coder)).startswith(f"vae {coder}: vae/{SAFE} is truncated or damaged (500 bytes): ")
        file.write_bytes(data)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin", "v.ckpt"])
def test_a_pickled_vae_is_refused_and_its_command_works(coder: Path, name: str):
    file = coder / "vae" / SAFE
    before = load_file(file)
    pickle_weights(file, name)
    for path in (coder, coder / "vae"):
        told = refusal(vae_hash, str(path))
        assert told.startswith(
            f"vae {path}: vae/ has no .safetensors file; {name} is a pickle: convert it with safetensors first:\n"
        )
    run_command(told)
    after = load_file(file)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert len(vae_hash(str(coder))) == 64


class Made(TorchDispatchMode):
    """The largest tensor of each dtype, in values, that is made outside of the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                self.largest[x.dtype] = max(self.largest.get(x.dtype, 0), x.numel())
        return out


@pytest.mark.parametrize(
    ("saved", "asked", "want"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float16),
        (torch.float32, None, torch.float32),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.bfloat16, "fp32", torch.float32),
    ],
    ids=str,
)
def test_encoders_are_made_in_their_own_dtype_or_the_one_asked_for_and_let_go(
    sd: Path, monkeypatch: pytest.MonkeyPatch, saved: torch.dtype, asked: Any, want: torch.dtype
):
    """No copy in another dtype is made on the way to bf16 or fp16; nothing of it outlives the filling."""
    file = sd / "text_encoder" / "model.safetensors"
    save_file({k: v.to(saved) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    models: list[Any] = []
    made, inner = Made(), module.load_text_model

    def spy(*args: Any, **more: Any) -> Any:
        with made:
            model = inner(*args, **more)
        assert {p.dtype for p in model.parameters()} == {want}
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(module, "load_text_model", spy)
    text = embed(PipelineEncoder(path=str(sd), dtype=asked), PROMPTS, cache=str(sd.parent / "cache"))
    assert [m() for m in models] == [None]
    assert text.shards.take(torch.arange(2))["text"].dtype == want
    least = min(v.numel() for v in load_file(file).values() if v.ndim == 2)
    assert made.largest[want] >= least
    if saved == want != torch.float32:
        assert made.largest.get(torch.float32, 0) < least


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_embeds_what_a_cpu_does(sd: Path):
    rows = []
    for device in ("cuda", "cpu"):
        with encoding(device):
            rows.append(embed(PipelineEncoder(path=str(sd)), PROMPTS, cache=str(sd.parent / device)))
    k = torch.arange(2)
    torch.testing.assert_close(rows[0].take(k)["text"], rows[1].take(k)["text"], rtol=0, atol=1e-4)


def test_prompts_are_cleaned_where_the_call_does_and_the_packages_are_here(monkeypatch: pytest.MonkeyPatch):
    for here in (True, False):
        monkeypatch.setattr(module, "cleans", lambda here=here: here)
        for kind in (PixArtSigmaPipeline, IFPipeline):
            assert module.call_options(kind)["clean_caption"] == here
        assert module.call_options(SanaPipeline)["clean_caption"] is False
    options = module.call_options(SanaPipeline)
    assert options["complex_human_instruction"][0].startswith("Given a user prompt")
    assert not options["do_classifier_free_guidance"]
    assert module.call_options(StableDiffusion3Pipeline)["max_sequence_length"] == 256
