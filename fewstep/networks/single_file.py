"""A teacher that is one file: what it holds by the names of its tensors, and the command that makes a folder of it."""

from __future__ import annotations

from pathlib import Path

from fewstep.networks.weights import PICKLES, shell

PIPELINES = {
    "StableDiffusionXLPipeline": ("conditioner.embedders.1.", "Stable Diffusion XL"),
    "StableDiffusion3Pipeline": ("model.diffusion_model.joint_blocks.", "Stable Diffusion 3"),
    "StableDiffusionPipeline": ("model.diffusion_model.input_blocks.", "Stable Diffusion 1 and 2"),
}
"""Whole pipelines in one file: the front of a name that tells the class, and its family; the first that fits counts."""
NETWORKS = {
    "Flux2Transformer2DModel": "single_stream_modulation.",
    "ChromaTransformer2DModel": "distilled_guidance_layer.",
    "HunyuanVideoTransformer3DModel": "txt_in.individual_token_refiner.",
    "FluxTransformer2DModel": "double_blocks.0.img_attn.norm.",
    "WanTransformer3DModel": "blocks.0.self_attn.",
    "QwenImageTransformer2DModel": "transformer_blocks.0.img_mlp.",
    "ZImageTransformer2DModel": "layers.0.adaLN_modulation.0.",
    "Lumina2Transformer2DModel": "cap_embedder.0.",
}
"""Networks alone in one file, of which the rest of a pipeline is missing; the first that fits counts.

Flux's names are in Chroma and HunyuanVideo too, and Lumina 2's in Z-Image, which therefore stand before them; marks as
diffusers 0.42 tells them apart."""


def refusal(file: Path, shown: str) -> str:
    """Why a file is no teacher, and what makes one of it, in a sentence and a command."""
    if file.suffix.lower() == ".gguf":
        return (
            f"teacher {shown}: is a GGUF, the quantised weights of a network alone, from which nothing is trained; give "
            "the folder of the pipeline that it was made of, with dtype: bf16 beside its path for half the memory"
        )
    to = file.with_suffix("")
    names = _names(file)
    begin = f"teacher {shown}: is a single file, not a pipeline folder; "
    for kind, mark in NETWORKS.items():
        if any(n.removeprefix("model.diffusion_model.").startswith(mark) for n in names):
            part = str(to / "transformer")
            code = f"from diffusers import {kind} as M; M.from_single_file({str(file)!r}, config={part!r})"
            return (
                f"{begin}it holds a {kind} alone: fetch the pipeline's folder as {to} (`hf download ORG/NAME --local-dir "
                f"{to}`), put the file's weights into it, then give {to}:\n"
                f"  {shell(f'{code}.save_pretrained({part!r})')}"
            )
    unknown = ("PIPELINE", "none that is known here has tensors of these names; put it in for PIPELINE")
    if file.suffix in PICKLES:
        unknown = ("StableDiffusionPipeline", "a pickle is not opened; this is that of Stable Diffusion 1 and 2")
    known = ((k, f"here {family}") for k, (mark, family) in PIPELINES.items() if any(n.startswith(mark) for n in names))
    kind, family = next(known, unknown)
    code = f"from diffusers import {kind} as P; P.from_single_file({str(file)!r})"
    return (
        f"{begin}write it as one with the pipeline class of its family ({family}), then give {to}:\n"
        f"  {shell(f'{code}.save_pretrained({str(to)!r})')}"
    )


def _names(file: Path) -> list[str]:
    """Of its tensors; none for what is no safetensors, for a pickle is not opened."""
    from safetensors import SafetensorError, safe_open

    if file.suffix in PICKLES:
        return []
    try:
        with safe_open(file, framework="pt") as f:
            return list(f.keys())
    except (SafetensorError, OSError, ValueError):
        return []
