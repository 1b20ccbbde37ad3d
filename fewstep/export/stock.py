"""A stock diffusers pipeline run on given latents and conditions, without its text encoders: what others will get."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.condition import checked
from fewstep.files import read_json
from fewstep.networks.folder import part_of
from fewstep.networks.wrappers import Wrapper

_LEFT_OUT = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")


def open_stock(root: Path, **components: Any) -> Any:
    """The pipeline of a folder in float32, without text encoders; `components` replace its own."""
    from diffusers import DiffusionPipeline

    index = read_json(root / "model_index.json")
    absent = [k for k, v in index.items() if v == [None, None] or (part_of(v) and k.startswith(_LEFT_OUT))]
    none: dict[str, Any] = {k: None for k in absent if k not in components}
    if "safety_checker" in none:
        none["requires_safety_checker"] = False
    pipe = DiffusionPipeline.from_pretrained(root, torch_dtype=torch.float32, use_safetensors=True, **none, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def run_stock(pipe: Any, net: Wrapper, start: Tensor, cond: Any, levels: Mapping[str, Any], seed: int = 0) -> Tensor:
    """Latents of `start`'s shape that the pipeline draws from the noise `start`, without guidance.

    All further noise comes from torch's global generator with this seed, as pipelines that hand none to their
    scheduler have it (SD3, Flux, DiT); `fresh_noise` draws the same. levels: num_inference_steps, timesteps or
    sigmas.
    """
    size = tuple(start.shape[2:])
    given = checked(cond, net.wanted, net.takes, type(net.model).__name__)
    call = {**net.plain, **net.arguments(given, size), **net.of_size(size), **levels}
    with torch.random.fork_rng(devices=[]):
        if "label" in net.needs:
            return _class_conditional(pipe, start, call, seed)
        torch.manual_seed(seed)
        if not any(key.startswith("vae_scale_factor") for key in vars(pipe)):
            return _pixels(pipe, start, call)
        scale = net.pixels if net.pixels > 1 else pipe.vae_scale_factor
        high, wide = (n * scale for n in size[-2:])
        out = pipe(latents=net.to_pipeline(start), height=high, width=wide, output_type="latent", **call)
    return net.drawn(out.frames if hasattr(out, "frames") else out.images, size, pipe)


def _pixels(pipe: Any, start: Tensor, call: Mapping[str, Any]) -> Tensor:
    """IFPipeline takes no start: what draws it is stood in for. Its images, neither clamped nor rounded."""
    pipe.prepare_intermediate_images = lambda *_: start * pipe.scheduler.init_noise_sigma
    try:
        return pipe(height=start.shape[2], width=start.shape[3], output_type="pt", **call).images
    finally:
        del pipe.prepare_intermediate_images


def _class_conditional(pipe: Any, start: Tensor, call: Mapping[str, Any], seed: int) -> Tensor:
    """DiTPipeline takes no latents and returns images: its draw and its decoder are stood in for."""
    import diffusers.pipelines.dit.pipeline_dit as module

    seen: list[Tensor] = []
    decode, draw = pipe.vae.decode, module.randn_tensor

    def capture(z: Tensor, *args: Any, **more: Any) -> Any:
        seen.append(z * pipe.vae.config.scaling_factor)
        return decode(z[:1], *args, **more)

    pipe.vae.decode, module.randn_tensor = capture, lambda *_, **__: start.clone()
    try:
        torch.manual_seed(seed)
        pipe(output_type="pt", **call)
    finally:
        del pipe.vae.decode
        module.randn_tensor = draw
    return seen[0]


def fresh_noise(net: Wrapper, start: Tensor, seed: int = 0) -> Any:
    """The noise that `run_stock` adds after step i, in order: a function for fewstep's sampler."""
    generator = torch.Generator().manual_seed(seed)
    shape, size = net.stepped(start).shape, tuple(start.shape[2:])
    if net.picture is not None:  # IFSuperResolutionPipeline draws noise for the picture first, whatever its level
        torch.randn(len(start), net.image_channels, *size, generator=generator)
    return lambda _: net.unstepped(torch.randn(shape, generator=generator), size)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| over the larger of 1 and the root mean square of theirs."""
    scale = max(1.0, float(theirs.double().square().mean().sqrt()))
    return float((ours.double() - theirs.double()).abs().max()) / scale


def without_variance(scheduler: Any) -> Any:
    """The scheduler as IFPipeline wants it for a network that predicts no variance beside the image.

    The pipeline cuts the network's output in halves unless the config says "learned"; then the scheduler gets it
    whole, and those used here do not look at the key.
    """
    scheduler.register_to_config(variance_type="learned")
    return scheduler
