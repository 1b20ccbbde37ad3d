"""A ComfyUI graph (its API's JSON) that draws with an adapter at the trained levels; ComfyUI itself was not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fewstep.algebra.process import DiscreteVP, Flow, Process
from fewstep.algebra.sampling import Sampler
from fewstep.export.base import ExportRefused
from fewstep.export.routes import plain_kind

WORKFLOW = "workflow.json"
PURE = 1e5
"""Sigma over alpha above every level of a table that ends before pure noise (squared cosines: 2e4)."""
Node = dict[str, Any]


@dataclass(frozen=True)
class Nodes:
    """The nodes of a family: what loads its text encoders, "" for one checkpoint with all of it, and its empty latents.

    clips: number of text encoders. type: of the loader. guidance: the scale is a condition of its own.
    """

    clips: int = 0
    type: str = ""
    latents: str = "EmptyLatentImage"
    guidance: bool = False


FAMILIES: Mapping[str, Nodes] = {
    "StableDiffusionPipeline": Nodes(),
    "StableDiffusionXLPipeline": Nodes(),
    "StableDiffusion3Pipeline": Nodes(3, latents="EmptySD3LatentImage"),
    "FluxPipeline": Nodes(2, "flux", "EmptySD3LatentImage", guidance=True),
    "ChromaPipeline": Nodes(1, "chroma", "EmptySD3LatentImage"),
    "QwenImagePipeline": Nodes(1, "qwen_image", "EmptySD3LatentImage"),
    "ZImagePipeline": Nodes(1, "lumina2", "EmptySD3LatentImage"),
    "Flux2Pipeline": Nodes(1, "flux2", "EmptyFlux2LatentImage", guidance=True),
    "Flux2KleinPipeline": Nodes(1, "flux2", "EmptyFlux2LatentImage"),
}
"""By the pipeline's class; names of nodes and inputs are those of ComfyUI's own examples."""


def sigmas_of(process: Process, sampler: Sampler) -> list[float]:
    """The trained levels as ComfyUI counts them, first to last and 0: sigma over alpha, of a flow its t.

    Raises ExportRefused for a process whose levels it has no number for, pure noise of a table among them.
    """
    t = process.grid(torch.tensor(sampler.steps, dtype=torch.float64))
    if isinstance(process, Flow):
        return [*t.tolist(), 0.0]
    if not isinstance(process, DiscreteVP):
        raise ExportRefused(f"no ComfyUI workflow is known for levels of {type(process).__name__}")
    ratios = (process.sigma(t) / process.alpha(t)).tolist()
    if max(ratios) > PURE:
        raise ExportRefused(
            "the first level is pure noise (zero terminal SNR), whose sigma over alpha is no number that ComfyUI could "
            "start at; draw with the diffusers pipeline"
        )
    return [*ratios, 0.0]


def sampler_of(process: Process, sampler: Sampler) -> str:
    """ComfyUI's sampler whose step is this one's: `lcm` re-noises, `euler` goes on in a straight line (DDIM)."""
    kind = plain_kind(sampler, process)
    if any(sampler.history) or (kind == "gamma" and len(sampler.steps) > 1):
        raise ExportRefused("no ComfyUI sampler is known that takes these steps; draw with the diffusers pipeline")
    return "lcm" if kind == "renoise" and len(sampler.steps) > 1 else "euler"


def workflow(
    pipeline: str, process: Process, sampler: Sampler, size: tuple[int, int], lora: str, guidance: float | None = None
) -> dict[str, Node]:
    """The graph, node by number; files of the base model stand there under names to be replaced.

    Args:
        size: height and width of the picture in pixels.
        lora: name of the adapter's file in ComfyUI's models/loras.
        guidance: the scale that the network takes as an input.

    Raises ExportRefused for families and steps that are not known there.
    """
    nodes = FAMILIES.get(pipeline)
    if nodes is None:
        raise ExportRefused(f"no ComfyUI workflow is known for {pipeline}; those are of {', '.join(FAMILIES)}")
    sigmas = ", ".join(f"{s:.9g}" for s in sigmas_of(process, sampler))
    graph: dict[str, Node] = {}
    if nodes.clips == 0:
        graph["1"] = _node("CheckpointLoaderSimple", "the base model", ckpt_name="BASE.safetensors")
        model, clip, vae = ["1", 0], ["1", 1], ["1", 2]
    else:
        graph["1"] = _node("UNETLoader", "the base model", unet_name="BASE.safetensors", weight_dtype="default")
        kind = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader"}[nodes.clips]
        names = ["clip_name"] if nodes.clips == 1 else [f"clip_name{i + 1}" for i in range(nodes.clips)]
        files = {name: f"TEXT{i + 1}.safetensors" for i, name in enumerate(names)}
        graph["2"] = _node(kind, "its text encoders", **files, **({"type": nodes.type} if nodes.type else {}))
        graph["3"] = _node("VAELoader", "its VAE", vae_name="VAE.safetensors")
        model, clip, vae = ["1", 0], ["2", 0], ["3", 0]
    graph["4"] = _node("LoraLoaderModelOnly", "the few-step adapter", model=model, lora_name=lora, strength_model=1.0)
    graph["5"] = _node("CLIPTextEncode", "prompt", clip=clip, text="a red fox in the snow")
    graph["6"] = _node("CLIPTextEncode", "not used at cfg 1", clip=clip, text="")
    positive = ["5", 0]
    if nodes.guidance and guidance is not None:
        graph["7"] = _node("FluxGuidance", "as trained", conditioning=positive, guidance=float(guidance))
        positive = ["7", 0]
    graph["8"] = _node(nodes.latents, "size", width=size[1], height=size[0], batch_size=1)
    graph["9"] = _node("KSamplerSelect", "", sampler_name=sampler_of(process, sampler))
    graph["10"] = _node("ManualSigmas", "the trained levels", sigmas=sigmas)
    graph["11"] = _node(
        "SamplerCustom", "", model=["4", 0], add_noise=True, noise_seed=0, cfg=1.0, positive=positive,
        negative=["6", 0], sampler=["9", 0], sigmas=["10", 0], latent_image=["8", 0],
    )  # fmt: skip
    graph["12"] = _node("VAEDecode", "", samples=["11", 0], vae=vae)
    graph["13"] = _node("SaveImage", "", images=["12", 0], filename_prefix="fewstep")
    return graph


def _node(kind: str, title: str, **inputs: Any) -> Node:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}
