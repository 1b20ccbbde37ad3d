"""Each family goes the whole way: check, prompts, latents, an update, an export that plain diffusers draws from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from snippets import run_snippet
from tiny_encoders import MASKED, OLDER, SIZE, called, make_older
from tiny_families import PROMPTS, TODAY, make_today
from tiny_new import make_pictures
from tiny_pipelines import FAMILIES, make_pipeline
from torch import Tensor

from fewstep.algebra.guidance import Guided
from fewstep.algebra.sampling import Sampler, sample
from fewstep.cli import main
from fewstep.commands import check_teacher as module
from fewstep.commands.check_recipe import check
from fewstep.commands.check_teacher import check_teacher
from fewstep.commands.export import export_run
from fewstep.commands.new import Wish, new
from fewstep.data.encoders import HIDING, OUTPUTS, PipelineEncoder
from fewstep.data.latents import Encoder, decoder
from fewstep.data.text import embed
from fewstep.export.base import PARITY
from fewstep.export.stock import difference, open_stock
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.wrappers.base import WRAPPERS
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer

SMALL = ("train.steps=1", "train.batch=2", "train.accumulate=1", "train.precision=fp32", "train.sample_every=0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_today(root / name, name) for name in TODAY}


@pytest.mark.parametrize("name", TODAY)
def test_check_teacher_holds(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(module, "denoising", lambda net, x: ("not tried", None))  # untrained under every reading
    report = check_teacher(str(folders[name]), size=TODAY[name].shape[1:])
    assert report.ok, report.text()
    assert [f for f in report.findings if f.ok is False] == []
    assert [f.name for f in report.findings if f.name.startswith("samples")] == ["samples, 1 step", "samples, 4 steps"]


@pytest.mark.parametrize("name", TODAY)
def test_the_whole_way(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """`new`, `cache-latents`, one update against pictures and prompts, `export`, and the lines of its card."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    folder, family = folders[name], TODAY[name]
    pixels = load_denoiser(str(folder), size=family.shape[1:]).net.pixels
    for i, prompt in enumerate(PROMPTS):
        (make_pictures(tmp_path / "photos", 3, (40, 40)) / f"{i}.txt").write_text(prompt)
    side = 4 * pixels
    told = list(new(Wish(Path("mine.yaml"), 2, data=Path("photos"), teacher=str(folder))))
    ran("cache-latents", "mine-pictures.yaml", f"data.size={side}", *told[2].split()[3:])
    settings = [*SMALL, "discriminator.width=4", "data.text_cache=text"]
    recipe = load("mine.yaml", settings)
    run = tmp_path / "run"
    trainer = Trainer(recipe, run, cpu=True)
    before = [p.detach().clone() for p in trainer.roles.student.parameters()]
    trainer.fit()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.roles.student.parameters(), strict=True))
    done = export_run(run, tmp_path / "out", force=False)
    assert done.parity <= PARITY
    scale = recipe.method.guidance  # type: ignore[attr-defined]
    if scale != 1:
        theirs = next(iter(family.guided.items()))
        row = f"| guidance in its weights | {scale:g} where 1 is none; of the teacher's pipeline {theirs[0]}="
        assert row + f"{scale - 3 + theirs[1]:g} |" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == family.pipeline
    run_snippet(done.usage, tmp_path / "reader")
    if name == "wan":  # parts of which diffusers keeps in float32
        half = export_run(run, tmp_path / "half", force=False, dtype="bf16")
        assert half.parity <= PARITY
        file = "transformer/diffusion_pytorch_model.safetensors"
        sizes = [(tmp_path / made / file).stat().st_size for made in ("half", "out")]
        assert sizes[0] < 0.62 * sizes[1]
        card = yaml.safe_load((tmp_path / "half" / "README.md").read_text().split("---")[1])
        assert card["pipeline_tag"] == "text-to-video"


@pytest.mark.long
@pytest.mark.parametrize("name", TODAY)
def test_adapters_go_the_whole_way(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """Two LoRA sets on the teacher, of prompts alone: an update, the merged export, the file in two layouts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    folder, family = folders[name], TODAY[name]
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    list(new(Wish(Path("mine.yaml"), 4, teacher=str(folder), lora=True, prompts=Path("prompts.txt"))))
    settings = [*SMALL, f"data.shape={list(family.shape)}", "train.steps=2"]
    assert "will not export" not in "\n".join(check("mine.yaml", settings))
    trainer = Trainer(load("mine.yaml", settings), tmp_path / "run", cpu=True)
    trainer.fit()
    done = export_run(tmp_path / "run", tmp_path / "out", force=False)
    assert done.parity <= PARITY
    run_snippet(done.usage, tmp_path / "reader")
    for layout in ("diffusers", "comfyui"):
        adapter = export_run(tmp_path / "run", tmp_path / layout, force=False, lora=True, layout=layout)
        assert adapter.parity < 1e-5


def packed(x: Tensor) -> Tensor:
    """Tokens of 2 x 2 cells, by diffusers' own function."""
    return diffusers.FluxPipeline._pack_latents(x, *x.shape)


QWEN = ("qwen_image", "krea2")
"""Families of its VAE."""
VIDEO = ("wan", "sana_video", "hunyuan_video")
WHITENED = ("wan", "sana_video", *QWEN)
SCALED = ("flux2", "hunyuan_video")
"""Families whose network takes the guidance scale."""
PACKED = (*QWEN, "chroma", "ovis_image")
"""Families whose pipelines take tokens of 2 x 2 cells."""


def asked(name: str, cond: dict[str, Tensor], front: str = "") -> dict[str, Any]:
    """A condition as the pipeline's documentation has it."""
    text, mask = cond["text"], cond.get("mask")
    if name == "z_image":
        return {f"{front}prompt_embeds": [t[m.bool()] for t, m in zip(text, mask, strict=True)]}  # type: ignore[arg-type]
    key = f"{front}prompt_{'embeds' if name in QWEN else 'attention'}_mask"
    if name in ("lumina2", "krea2"):
        mask = cond["mask"].bool()
    if name == "auraflow":  # which multiplies padding's embeddings by it, and they are made already
        mask = torch.ones(text.shape[:2])
    pooled = {f"{front}pooled_prompt_embeds": cond["pooled"]} if "pooled" in cond else {}
    return {f"{front}prompt_embeds": text} | pooled | ({} if mask is None else {key: mask})


def own_latents(name: str, pipe: Any, x: Tensor, high: int, wide: int) -> Tensor:
    """What a pipeline returns as its latents in x's shape, by its own functions."""
    if name in PACKED:
        out = pipe._unpack_latents(x, high, wide, *(() if name == "krea2" else (pipe.vae_scale_factor,)))
        return out.squeeze(2) if out.ndim == 5 else out
    if name == "flux2":
        return x.transpose(1, 2).reshape(
            len(x), -1, high // (2 * pipe.vae_scale_factor), wide // (2 * pipe.vae_scale_factor)
        )
    if name == "flux2_klein":
        bn, eps = pipe.vae.bn, pipe.vae.config.batch_norm_eps
        cells = pipe._patchify_latents(x)
        return (cells - bn.running_mean.view(1, -1, 1, 1)) / (bn.running_var + eps).sqrt().view(1, -1, 1, 1)
    return x


STEPS = 6


@pytest.mark.parametrize("guided", [False, True], ids=["wide", "tall and guided"])
@pytest.mark.parametrize("name", TODAY)
@torch.no_grad()
def test_many_steps_are_the_plain_pipelines(folders: dict[str, Path], name: str, guided: bool):
    """The pipeline with its own grid, called here; with guidance its own argument, at fewstep's scale 3.

    FLUX.2's has none beside the scale that the model takes.
    """
    family, pipe = TODAY[name], open_stock(folders[name])
    turned, guided = guided, guided and bool(family.guided)
    shape = (*family.shape[:-2], family.shape[-1], family.shape[-2]) if turned else family.shape
    net: Any = load_denoiser(str(folders[name]), size=shape[1:])
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *shape, generator=generator)
    cond, null = net.net.example(2, generator), net.net.example(2, generator)
    high, wide = (n * net.net.pixels for n in shape[-2:])
    call: dict[str, Any] = {"num_inference_steps": STEPS, "height": high, "width": wide, "output_type": "latent"}
    call |= {"use_resolution_binning": False} if name == "sana_video" else {}
    # Their default is the empty text beside which no embedding is taken.
    call |= {"negative_prompt": None} if name in ("ovis_image", "sana_video") else {}
    call |= asked(name, cond) | (family.guided | asked(name, null, "negative_") if guided else dict(net.net.plain))
    if name in SCALED:
        call["guidance_scale"] = float(cond["guidance"][0])
    if name in VIDEO:
        call["frames" if name == "sana_video" else "num_frames"] = 4 * (shape[1] - 1) + 1
        shift = {"wan": 3.0, "sana_video": 8.0, "hunyuan_video": 7.0}[name]
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    if name == "qwen_image":  # its grid ends at .02; where a network is asked is no matter of what it is
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift_terminal=None)
    call["latents"] = packed(x) if name in PACKED else x.clone()
    out = pipe(**call)
    theirs = own_latents(name, pipe, out.frames if name in VIDEO else out.images, high, wide)
    teacher = Guided(net, 3.0, lambda _: null) if guided else net
    levels = pipe.scheduler.sigmas[:STEPS].double()
    shift = getattr(net.process, "shift", 1.0)
    sampler = Sampler(kind="ode", steps=tuple((levels / (shift - (shift - 1) * levels)).tolist()), solver="ddim")
    assert difference(sample(sampler, teacher, x, cond), theirs) < 2e-5
    assert float(theirs.std()) > 0.1


@pytest.mark.parametrize("name", TODAY)
@torch.no_grad()
def test_latents_and_pictures_are_the_pipelines(folders: dict[str, Path], name: str):
    """x decoded here is what the pipeline decodes; a picture's x is what the pipeline's formula makes of its codes."""
    family, pipe = TODAY[name], open_stock(folders[name])
    net: Any = load_denoiser(str(folders[name]), size=family.shape[1:]).net
    x = torch.randn(1, *family.shape, generator=torch.Generator().manual_seed(4))
    high, wide = (n * net.pixels for n in family.shape[-2:])
    pipe.scheduler = Still.from_config(pipe.scheduler.config)
    call = {"num_inference_steps": 1, "height": high, "width": wide, "output_type": "pt", "latents": net.to_pipeline(x)}
    call |= dict(net.plain) | net.arguments(net.example(1), family.shape[1:]) | net.of_size(tuple(x.shape[2:]))
    out = pipe(**call)
    theirs = out.frames.transpose(1, 2) if name in VIDEO else out.images
    ours = (decoder(str(folders[name]))(x) / 2 + 0.5).clamp(0, 1)
    if name in VIDEO:
        ours = ours.unflatten(3, (-1, wide)).transpose(2, 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    picture = torch.rand(2, 3, high, wide, generator=torch.Generator().manual_seed(5)) * 2 - 1
    mean, deviation = Encoder(str(folders[name]))(picture)
    assert mean.shape == deviation.shape == (2, *(net.channels(), *((1,) if name in VIDEO else ()), *family.shape[-2:]))
    seen = picture.unsqueeze(2) if name in (*VIDEO, *QWEN) else picture
    codes = pipe.vae.encode(seen).latent_dist
    if name.startswith("flux2"):
        own = torch.cat([pipe._encode_vae_image(row[None], None) for row in picture])
        spread = pipe._patchify_latents(codes.std) / (pipe.vae.bn.running_var + 1e-4).sqrt().view(1, -1, 1, 1)
    elif name in WHITENED:
        at = (1, -1, 1, 1, 1)
        own = (codes.mean - torch.tensor(pipe.vae.config.latents_mean).view(at)) / torch.tensor(
            pipe.vae.config.latents_std
        ).view(at)
        spread = codes.std / torch.tensor(pipe.vae.config.latents_std).view(at)
    else:
        own = (codes.mean - (pipe.vae.config.get("shift_factor") or 0.0)) * pipe.vae.config.scaling_factor
        spread = codes.std * pipe.vae.config.scaling_factor
    torch.testing.assert_close(mean, own.reshape(mean.shape), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(deviation, spread.reshape(mean.shape), rtol=1e-5, atol=1e-5)


class Still(diffusers.FlowMatchEulerDiscreteScheduler):
    """A scheduler that leaves x as it is, so that a pipeline decodes what it was given."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> Any:  # type: ignore[override]
        return (sample,)


def same_rows(rows: dict[str, Tensor], out: Sequence[Any], keys: Sequence[str], hides: bool) -> None:
    """Conditions of one prompt (1, ...) are what a pipeline's own call computed for it, padding that it sees included."""
    mask = rows["mask"][0].bool() if "mask" in rows else slice(None)
    for key, theirs in zip(keys, out, strict=False):
        want = theirs[0] if key else None
        if key == "text":
            whole = rows["text"][0]
            own = whole[mask] if hides or len(whole) != len(want) else whole
            want = want[out[keys.index("mask")][0].bool()] if hides else want
            torch.testing.assert_close(own, want, rtol=0, atol=1e-5)
            assert not hides or not bool(whole[~mask].any())
        elif key == "mask" and want is not None:
            assert rows["mask"][0].tolist()[: len(want)] == want.tolist()
        elif key:
            torch.testing.assert_close(rows[key][0], want, rtol=0, atol=1e-5)


RETURNS = {"lumina2": MASKED, "krea2": MASKED, "sana_video": MASKED, "hunyuan_video": ("text", "pooled", "mask")}
RETURNS |= {"chroma": ("text", "", "mask")}
"""Keys of what an encode_prompt returns; of the others the text alone."""


@pytest.mark.parametrize("name", TODAY)
@torch.no_grad()
def test_prompts_are_embedded_as_the_pipelines_call_embeds_them(folders: dict[str, Path], tmp_path: Path, name: str):
    """In batches of two, whose rows are of other lengths than the third; the text that guidance puts there is longer."""
    long = "one long line of blue two green dots a red square"
    text = embed(PipelineEncoder(path=str(folders[name])), PROMPTS, negative=long, cache=str(tmp_path), batch=2)
    ours, pipe = text.take(torch.arange(3)), diffusers.DiffusionPipeline.from_pretrained(folders[name])
    call = {"use_resolution_binning": False} if name == "sana_video" else {}
    for i, prompt in enumerate((*PROMPTS, long)):
        row = {k: v[i : i + 1] for k, v in ours.items()} if i < 3 else {k: v[:1] for k, v in text.null(ours).items()}
        same_rows(row, called(pipe, prompt, **call), RETURNS.get(name, ("text",)), TODAY[name].pipeline in HIDING)


@pytest.mark.parametrize("name", OLDER)
@torch.no_grad()
def test_prompts_of_older_families_too(tmp_path: Path, name: str):
    folder, older = make_older(tmp_path / "P", name), OLDER[name]
    rows = embed(PipelineEncoder(path=str(folder)), PROMPTS, cache=str(tmp_path / "cache"), batch=2).take(torch.arange(3))
    without = [k for k, v in older.parts().items() if v is None]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(without))
    for i, prompt in enumerate(PROMPTS):
        row = {k: v[i : i + 1] for k, v in rows.items()}
        same_rows(row, called(pipe, prompt, **SIZE, **older.call), older.returns, older.kind in HIDING)


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "krea2", "wan"])
def test_in_bfloat16_a_prompt_is_the_same_alone_and_beside_longer_ones(
    folders: dict[str, Path], tmp_path: Path, name: str
):
    encoder = PipelineEncoder(path=str(folders[name]), dtype="bf16")
    alone, beside = (embed(encoder, PROMPTS, cache=str(tmp_path / str(b)), batch=b) for b in (1, 3))
    k = torch.arange(3)
    assert {v.dtype for key, v in alone.shards.take(k).items() if key == "text"} == {torch.bfloat16}
    one, three = alone.take(k), beside.take(k)
    assert torch.equal(one.get("mask", k), three.get("mask", k))
    # A few roundings of 2**-9 in as many layers.
    assert float((one["text"] - three["text"]).abs().max()) < 2**-6 * float(one["text"].abs().max())
    plain = embed(PipelineEncoder(path=str(folders[name])), PROMPTS, cache=str(tmp_path / "plain")).take(k)["text"]
    gap = float((one["text"] - plain).abs().max() / plain.abs().max())
    assert 2**-12 < gap < 2**-4


def test_every_wrapped_pipeline_with_words_has_its_encoder():
    kinds = {cls.pipeline for cls in WRAPPERS.values()} | {older.kind for older in OLDER.values()}
    kinds |= {today.pipeline for today in TODAY.values()} | {"IFSuperResolutionPipeline"}
    worded = {kind for kind in kinds if kind and hasattr(getattr(diffusers, kind), "encode_prompt")}
    assert len(worded) >= 20
    assert worded <= set(OUTPUTS)
    assert set(HIDING) < worded


@pytest.mark.parametrize(
    "name", [n for n in TODAY if TODAY[n].pipeline in (*HIDING, "ChromaPipeline")] + ["pixart", "sana"]
)
@torch.no_grad()
def test_padding_is_hidden_from_the_networks_that_are_said_not_to_see_it(
    folders: dict[str, Path], tmp_path: Path, name: str
):
    """Bit by bit the same answer whatever stands under the mask, but Chroma's, whose padding is therefore kept."""
    folder = folders[name] if name in folders else make_pipeline(tmp_path / name, name)
    shape = TODAY[name].shape if name in TODAY else FAMILIES[name].shape
    net: Any = load_denoiser(str(folder), size=shape[1:])
    generator = torch.Generator().manual_seed(3)
    x, cond = torch.randn(2, *shape, generator=generator), dict(net.net.example(2, generator))
    mask = torch.ones(cond["text"].shape[:2])
    mask[0, -2:] = 0
    if name == "krea2":  # which has padding before its last words
        mask[1, 1:3] = 0
    answers = []
    for scale in (0.0, 100.0):
        noise = scale * torch.randn(cond["text"].shape, generator=generator)
        text = torch.where(mask.bool().reshape(*mask.shape, *(1,) * (noise.ndim - 2)), cond["text"], noise)
        answers.append(net.net(x, torch.tensor([0.3, 0.6]), cond | {"text": text, "mask": mask})[0])
    assert torch.equal(*answers) == (name != "chroma")


def ran(*arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert not caught.value.code
