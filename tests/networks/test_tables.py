"""Folders of other noise tables, of EDM's levels and of few-step students: samples are the plain pipeline's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as d
import pytest
import torch
from tiny_pipelines import SD_BETAS, built, sana, sdxl, text_parts, unet_condition, vae

from fewstep.algebra.process import DiscreteVP
from fewstep.algebra.sampling import Sampler, sample
from fewstep.commands import check_teacher as module
from fewstep.commands.check_teacher import check_teacher
from fewstep.export.stock import difference, fresh_noise, open_stock
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.folder import read_folder

TRAILING: dict[str, Any] = {"timestep_spacing": "trailing", "clip_sample": False}


def xl(scheduler: Any, **statistics: Any) -> Any:
    """SDXL with another scheduler, and a VAE with statistics of its channels."""
    pipe = sdxl()
    pipe.register_modules(scheduler=scheduler, vae=vae(4, scaling_factor=0.5, **statistics))
    return pipe


def zero_snr() -> Any:
    return xl(d.DDIMScheduler(**SD_BETAS, **TRAILING, prediction_type="v_prediction", rescale_betas_zero_snr=True))


def squared_cosine() -> Any:
    return xl(d.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", **TRAILING))


def own_betas() -> Any:
    betas = torch.linspace(0.01, 0.3, 60).tolist()
    return xl(d.DDIMScheduler(trained_betas=betas, num_train_timesteps=60, prediction_type="v_prediction", **TRAILING))


def playground() -> Any:
    return xl(d.EDMEulerScheduler(), latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.5, 0.7, 2.0, 1.1])


FOLDERS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (zero_snr, squared_cosine, own_betas, playground)}


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "denoising", lambda net, x: ("not tried", None))
    monkeypatch.setattr(module, "_tangent", lambda case: ())


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("name", FOLDERS)
@torch.no_grad()
def test_many_steps_are_the_plain_pipelines(tmp_path: Path, name: str):
    built(FOLDERS[name]).save_pretrained(tmp_path / "T")
    net: Any = load_denoiser(str(tmp_path / "T"), size=(8, 12))
    generator = torch.Generator().manual_seed(3)
    x, cond = torch.randn(2, 4, 8, 12, generator=generator), net.net.example(2, generator)
    pipe = open_stock(tmp_path / "T")
    pixels = 2
    theirs = pipe(
        prompt_embeds=cond["text"], pooled_prompt_embeds=cond["pooled"], guidance_scale=1.0, num_inference_steps=5,
        latents=x.clone(), height=8 * pixels, width=12 * pixels, output_type="latent",
    ).images  # fmt: skip
    if isinstance(net.process, DiscreteVP):
        levels = (pipe.scheduler.timesteps.double() + 1) / net.process.steps
    else:
        levels = net.process.level(pipe.scheduler.sigmas[:5].double())
        # EDM's schedulers begin with sqrt(sigma_max^2 + 1) in place of sigma_max.
        x = x * (80.0**2 + 1) ** 0.5 / 80.0
    ours = sample(Sampler(kind="ode", steps=tuple(levels.tolist())), net, x, cond)
    assert difference(ours, theirs) < 2e-5
    report = check_teacher(str(tmp_path / "T"), size=(8, 12))
    assert report.ok, report.text()


def test_latents_of_playground_are_the_pipelines(tmp_path: Path):
    """SDXL's pipeline decodes x std / scale + mean."""
    built(playground).save_pretrained(tmp_path / "T")
    latents = read_folder(str(tmp_path / "T")).latents
    assert latents is not None
    x = torch.randn(2, 4, 3, 5)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in ([0.1, -0.2, 0.3, 0.4], [1.5, 0.7, 2.0, 1.1]))
    torch.testing.assert_close(latents.decode(x), x * std / 0.5 + mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(latents.encode(latents.decode(x)), x, rtol=1e-5, atol=1e-6)


def lcm() -> Any:
    scheduler = d.LCMScheduler(**SD_BETAS, prediction_type="epsilon", clip_sample=False)
    unet = unet_condition(time_cond_proj_dim=9)
    return d.StableDiffusionPipeline(**text_parts(unet=unet, vae=None, scheduler=scheduler))


@pytest.mark.usefixtures("untrained")
@torch.no_grad()
def test_a_latent_consistency_model_is_told_its_guidance(tmp_path: Path):
    built(lcm).save_pretrained(tmp_path / "T")
    report = check_teacher(str(tmp_path / "T"), size=(8, 12))
    assert report.ok, report.text()
    net: Any = load_denoiser(str(tmp_path / "T"), size=(8, 12), guidance=6.0)
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 4, 8, 12, generator=generator), torch.randn(2, 7, 12, generator=generator)
    pipe = open_stock(tmp_path / "T")
    call = {"prompt_embeds": text, "num_inference_steps": 4, "height": 64, "width": 96, "output_type": "latent"}
    torch.manual_seed(0)
    theirs = pipe(**call, guidance_scale=6.0, latents=x.clone()).images
    levels = tuple(((pipe.scheduler.timesteps.double() + 1) / 1000).tolist())
    fresh = fresh_noise(net.net, x)
    ours = sample(Sampler(kind="renoise", steps=levels), net, x, {"text": text}, fresh)
    # Its boundary scalings, c_skip of 2.5e-7 at the last index, are no part of the denoiser.
    assert difference(ours, theirs) < 2e-5
    torch.manual_seed(0)
    other = pipe(**call, guidance_scale=2.0, latents=x.clone()).images
    assert difference(ours, other) > 1e-3
    with pytest.raises(ValueError, match="takes its guidance scale as an input"):
        load_denoiser(str(tmp_path / "T"))(x, torch.full((2,), 500.0), {"text": text})


def sprint() -> Any:
    model = sana().transformer
    told = {k: v for k, v in model.config.items() if not k.startswith("_")}
    transformer = d.SanaTransformer2DModel(**told | {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"})
    return d.SanaSprintPipeline(
        transformer=transformer, scheduler=d.SCMScheduler(), vae=None, tokenizer=None, text_encoder=None
    )


@pytest.mark.usefixtures("untrained")
@torch.no_grad()
def test_sana_sprint_is_a_flow_again(tmp_path: Path):
    built(sprint).save_pretrained(tmp_path / "T")
    report = check_teacher(str(tmp_path / "T"), size=(8, 12))
    assert report.ok, report.text()
    net: Any = load_denoiser(str(tmp_path / "T"), size=(8, 12))
    generator = torch.Generator().manual_seed(3)
    x, cond = torch.randn(2, 5, 8, 12, generator=generator), net.net.example(2, generator)
    pipe = open_stock(tmp_path / "T")
    torch.manual_seed(0)
    theirs = pipe(
        prompt_embeds=cond["text"], prompt_attention_mask=cond["mask"], guidance_scale=4.5, num_inference_steps=2,
        latents=x.clone(), height=8 * 32, width=12 * 32, use_resolution_binning=False, output_type="latent",
    ).images  # fmt: skip
    angles = torch.tensor([1.57080, 1.3], dtype=torch.float64)
    levels = (angles.sin() / (angles.cos() + angles.sin())).clamp(max=1.0)
    ours = sample(Sampler(kind="renoise", steps=tuple(levels.tolist())), net, x, cond, fresh_noise(net.net, x))
    assert difference(ours, theirs) < 5e-5  # it begins at 1.5708, a little beyond pure noise
