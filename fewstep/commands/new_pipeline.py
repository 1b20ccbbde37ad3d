"""`fewstep new --teacher`: a student of a pipeline folder, with the settings that its family was published with."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.algebra.process import DiscreteVP, ShiftedFlow
from fewstep.commands.new_lines import Lines, evaluation, levels, one_of, quoted
from fewstep.commands.new_memory import BATCH, Fit
from fewstep.config import UserError
from fewstep.data.text import read_prompts
from fewstep.export.forecast import outlined_teacher
from fewstep.files import read_json
from fewstep.networks.folder import read_folder
from fewstep.networks.teachers import DiffusersTeacher

METHODS = ("dmd2",)
UNET_LAYERS = (
    "[to_q, to_k, to_v, to_out.0, proj_in, proj_out, ff.net.0.proj, ff.net.2, conv1, conv2, conv_shortcut, "
    "downsamplers.0.conv, upsamplers.0.conv, time_emb_proj]"
)
"""Layers of a UNet that DMD2's LoRA adapts (tianweiy/DMD2 @ 8d8fa55, sd_unified_model.py)."""
BLOCK_LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp",
    "to_qkv_mlp_proj", "to_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "ff.linear_in",
    "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out", "ffn.net.0.proj", "ffn.net.2", "img_mlp.net.0.proj",
    "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
)  # fmt: skip
"""Linear layers of attention and feed-forward parts in diffusers' transformers; depthwise convolutions do not merge."""


@dataclass(frozen=True)
class Published:
    """What is known of a family: guidance, critic updates and rates, each (YAML, where it comes from)."""

    guidance: tuple[float, str]
    critic: tuple[int, str]
    rates: tuple[str, str, str]
    """Rate of the student, of the critic, and where they come from."""


_SD15 = "DMD2, tianweiy/DMD2 @ 8d8fa55, experiments/sdv1.5"
_SDXL = "DMD2, tianweiy/DMD2 @ 8d8fa55, experiments/sdxl"
_PHASED = "Phased DMD, arXiv 2510.27684"
_WAN = "LightX2V's for flow models such as Wan"
FAMILIES = {
    "StableDiffusionPipeline": Published((1.75, _SD15), (10, _SD15), ("1e-5", "1e-5", _SD15)),
    "StableDiffusionXLPipeline": Published((8.0, _SDXL), (5, _SDXL), ("5e-7", "5e-7", _SDXL)),
}
"""Families with published DMD2 settings; others take their pipeline's own guidance and what flow models have."""


@dataclass(frozen=True)
class Family:
    """A pipeline folder, read and not loaded."""

    folder: str
    pipeline: str
    net: Any
    """Its denoiser without weights."""
    latents: Any
    """Of its VAE; None where there is none."""
    zeros: bool
    """Guidance moves away from zeros (SDXL)."""

    @property
    def wrapper(self) -> Any:
        return self.net.net

    @property
    def text(self) -> bool:
        return "text" in self.wrapper.needs

    @property
    def labels(self) -> int:
        """Classes, 0 for none."""
        return int(self.wrapper.classes)

    @property
    def table(self) -> int | None:
        """Length of its table of noise levels; None for a flow."""
        return self.net.process.steps if isinstance(self.net.process, DiscreteVP) else None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.wrapper.channels(), *self.wrapper.sample_size())

    @property
    def embeds_guidance(self) -> bool:
        return "guidance" in self.wrapper.takes and self.wrapper.takes_scale

    def taps(self) -> tuple[str, str]:
        """(taps of a discriminator, where they come from)."""
        blocks = list(self.wrapper.blocks())
        if "mid" in blocks:
            return "[mid]", "the middle block, as DMD2 has it"
        at = sorted({min(int(share * len(blocks)), len(blocks) - 1) for share in (0.5, 0.75, 0.99)})
        return f"[{', '.join(blocks[i] for i in at)}]", f"blocks at 50, 75 and 99 % of its {len(blocks)}, ours"

    def layers(self) -> tuple[str, str, str]:
        """(layers of an adapter, its rank and scale's source, the layers' source)."""
        names = [name for name, m in self.wrapper.model.named_modules() if isinstance(m, nn.Linear)]
        if "mid" in self.wrapper.blocks():
            return UNET_LAYERS, f"{_SDXL}, its LoRA run", "and its layers"
        found = [layer for layer in BLOCK_LAYERS if any(name.endswith(f".{layer}") for name in names)]
        return f"[{', '.join(found)}]", _PHASED, "all attention and feed-forward layers, ours"

    def default_guidance(self) -> tuple[float, str]:
        """What the pipeline itself is called with, in fewstep's convention."""
        import diffusers

        call = inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters
        key = "guidance_scale" if self.embeds_guidance else next(iter(self.wrapper.plain))
        theirs = float(call[key].default)
        scale = theirs if self.embeds_guidance else self.wrapper.scale_of_pipeline(theirs)
        told = f"what {self.pipeline} is called with by itself"
        return scale, told if scale == theirs else f"{told}, where it is {theirs:g} and counts from 0"

    def published(self) -> Published:
        if self.pipeline in FAMILIES:
            return FAMILIES[self.pipeline]
        critic = (5, "DMD2's for ImageNet and SDXL (sec. 4.2); none is published for this family")
        if self.embeds_guidance:
            guidance = (1.0, "none beside the scale that the network takes as an input")
        elif self.pipeline == "FluxPipeline":
            guidance = (1.0, "none: schnell and its kin were distilled without")
        else:
            guidance = self.default_guidance()
        return Published(guidance, critic, ("2e-6", "4e-7", _WAN if self.table is None else f"{_WAN}; ours here"))


def look(folder: str) -> Family:
    """Read a pipeline folder; UserError says what is wrong with it."""
    found = read_folder(folder)
    net = outlined_teacher(DiffusersTeacher(path=folder))
    zeros = bool(found.index.get("force_zeros_for_empty_prompt", False))
    return Family(folder, net.net.pipeline, net, found.latents, zeros)  # type: ignore[union-attr]


def student(family: Family, method: str, steps: int, *, fit: Fit, prompts: Path | None, latents: Path | None) -> Lines:
    """The recipe of the student.

    Args:
        fit: LoRA sets or whole networks, and how much of a device they take.
        prompts: a file of prompts, for a run without pictures.
        latents: a folder of `fewstep cache-latents`, for a run with a discriminator.
    """
    one_of(
        "for a pipeline", method, METHODS, "for LCM, TDD, TSCD or SiD copy a recipe of `fewstep recipes ls` under paper/"
    )
    known, table = family.published(), family.table
    flow = table is None
    one = f"{steps} step{'s' * (steps > 1)}"
    network = "copy, of: teacher"
    role = ("starts as the teacher", "starts as the teacher, and tracks the student")
    rates = known.rates
    if fit.lora:
        targets, source, which = family.layers()
        network = f"lora, of: teacher, rank: 64, alpha: 8.0, targets: {targets}"
        asked = fit.source or "--lora"
        role = (f"{asked}: rank and scale: {source}; {which}", "a second set on the same weights, as in emoji-dmd2-lora")
        rates = ("5e-5", "5e-5", source if table else f"{source}; the critic's ours")
    betas = "[0.0, 0.999]" if flow else "[0.9, 0.999]"
    gan = latents is not None
    guided = f", guidance: {_embedded(family)[0]}" if family.embeds_guidance else ""
    told = f"--teacher: {family.pipeline}" + (f"; {_embedded(family)[1]}" if guided else "")
    taps, why = family.taps()
    dtype = "" if fit.dtype == "fp32" else f", dtype: {fit.dtype}"
    told += f"; its weights in {fit.dtype}: {fit.source}" if dtype else ""
    away: Lines = [("  offload: true", f"idle roles are in main memory: {fit.source}")] if fit.offload else []
    freely = "`fewstep plan` tells what fits, lower it then"
    micro = f"{fit.micro} sample{'s' * (fit.micro > 1)} at a time"
    return [
        (f"about: {quoted(f'DMD2 of {Path(family.folder).name} in {one}')}", "written by `fewstep new`"),
        *(_latents(family, latents) if latents else _prompts(family, prompts)),
        (f"teacher: {{name: diffusers, path: {quoted(family.folder)}{guided}{dtype}}}", told),
        (f"student: {{name: {network}}}", role[0]),
        (f"critic: {{name: {network}}}", role[1]),
        *([(f"discriminator: {{trunk: critic, taps: {taps}}}", why)] if gan else []),
        ("method:", "distribution matching, arXiv 2405.14867"),
        ("  name: dmd2", "--method"),
        (f"  steps: {levels(steps, table)}", f"--steps {steps}, evenly spaced; {_spacing(family)}"),
        (f"  times: {_times(flow, 20, 980)}", "DMD2: min_step_percent .02, max_step_percent .98"),
        ("  critic:", "the network that denoises the student's samples"),
        (f"    times: {_times(flow, 0, 999)}", "DMD2: all levels"),
        (f"    weight: {family.net.prediction}", "a plain loss in what the network predicts, as DMD2's of eps"),
        (f"    steps: {known.critic[0]}", f"updates per student update: {known.critic[1]}"),
        (f"  guidance: {known.guidance[0]}", known.guidance[1]),
        *(_gan(flow) if gan else [("  gan: null", "there are no pictures, only prompts")]),
        ("optim:", "per role"),
        (f"  default: {{lr: {rates[1]}, betas: {betas}, weight_decay: 0.01, warmup: 8}}", rates[2]),
        (f"  student: {{lr: {rates[0]}, betas: {betas}, weight_decay: 0.01, warmup: 2}}", rates[2]),
        ("train:", "length, batch and precision"),
        ("  steps: 3000", "of the order of DMD2's 3,800 for SDXL"),
        (f"  batch: {BATCH}", "what one device does in a sitting; DMD2 has 128 for SDXL, 2,048 for SD1.5, on 64"),
        (f"  accumulate: {BATCH // fit.micro}", f"{micro}; {fit.source or freely}"),
        ("  clip: 10.0", "DMD2: max_grad_norm"),
        ("  precision: bf16", "DMD2's"),
        ("  product: student", "DMD2 keeps no average"),
        ("  ema: []", "DMD2 keeps no average"),
        ("  checkpointing: true", "activations are computed again in the backward pass, for memory"),
        *away,
        *evaluation(),
    ]  # fmt: skip


def _embedded(family: Family) -> tuple[float, str]:
    scale, source = family.default_guidance()
    return scale, f"the scale that the network takes as an input is {source}"


def _times(flow: bool, low: int, high: int) -> str:
    if flow:
        return f"{{name: uniform, low: {low / 1000:g}, high: {round(high / 1000, 2):g}}}"
    return f"{{name: index, low: {low}, high: {high}}}"


def _spacing(family: Family) -> str:
    if family.table is not None:
        return f"on its table of {family.table}"
    shift = family.net.process.shift if isinstance(family.net.process, ShiftedFlow) else 1.0
    return f"the time shift {shift:.3g} of its scheduler comes on top, here and in `times`"


def _gan(flow: bool) -> Lines:
    return [
        ("  gan:", _SDXL),
        ("    weight: 5e-3", "gen_cls_loss_weight"),
        ("    discriminator_weight: 1e-2", "guidance_cls_loss_weight"),
        (f"    times: {_times(flow, 0, 999)}", "diffusion_gan_max_timestep 1000"),
    ]


def _prompts(family: Family, prompts: Path | None) -> Lines:
    """Data of prompts alone. UserError for a family that needs pictures, and for a missing file."""
    if not family.text:
        kind = f"{family.labels} classes" if family.labels else "no text"
        raise UserError(
            f"--teacher {family.folder}: a {family.pipeline} takes {kind}, so prompts will not do; add --data FOLDER "
            "with its pictures"
        )
    if prompts is None:
        raise UserError(f"--teacher {family.folder}: takes text; add --prompts FILE (one a line), or --data FOLDER with "
                        "pictures and captions")  # fmt: skip
    count = len(read_prompts(prompts))
    sizes = ", ".join(map(str, family.shape))
    vae = [(f"  vae: {quoted(family.folder)}", "decodes the samples")] if family.latents else []
    return [
        ("data:", "prompts alone: the teacher's samples are not needed, only its score"),
        ("  name: prompts", "`fewstep explain data.prompts`"),
        (f"  path: {quoted(prompts)}", f"--prompts: {count} of them"),
        (f"  shape: [{sizes}]", "the size that the network was made for"),
        *vae,
        *_encoder(family),
    ]


def _encoder(family: Family) -> Lines:
    rows: Lines = [(f"  encoder: {{name: pipeline, path: {quoted(family.folder)}}}", "the teacher's own text encoders")]
    return rows + ([("  zeros: true", "force_zeros_for_empty_prompt of its model_index.json")] if family.zeros else [])


def _latents(family: Family, latents: Path) -> Lines:
    return [
        ("data:", "pictures as latents, which a discriminator needs"),
        ("  name: latents", "`fewstep explain data.latents`"),
        (f"  path: {quoted(latents)}", "what `fewstep cache-latents` writes"),
        (f"  vae: {quoted(family.folder)}", "the teacher's own"),
        *(_encoder(family) if family.text else []),
    ]


def pictures(family: Family, data: Path, extends: Path) -> Lines:
    """The recipe that `fewstep cache-latents` reads the pictures by. UserError for data that do not fit the teacher."""
    if family.latents is None:
        raise UserError(f"--data {data}: {family.folder} has no VAE in vae/, so pictures cannot become its latents; copy "
                        "it from the original pipeline, or leave --data out")  # fmt: skip
    *_, h, w = family.shape
    high, wide = h * family.latents.pixels, w * family.latents.pixels
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    if family.text:
        kind: Lines = [("  name: captions", "captions.jsonl, or a .txt beside every picture"),
                       (f"  size: {min(high, wide)}", f"the teacher was made for {high} x {wide} pixels"),
                       (f"  encoder: {{name: pipeline, path: {quoted(family.folder)}}}",
                        "captions are the conditions; the latents keep them as text")]  # fmt: skip
    else:
        kind = [("  name: images", f"its {family.labels} sub-folders are the classes, each {high} x {wide} pixels")]
    return [
        (f"extends: {quoted(extends.name)}", "all but the data"),
        (f"about: {quoted(f'pictures of {data.name}, to be encoded once')}", "written by `fewstep new`"),
        ("data:", "what `fewstep cache-latents` encodes"),
        kind[0],
        (f"  path: {quoted(data)}", "--data"),
        *kind[1:],
    ]


def is_cache(folder: Path) -> bool:
    """Whether a folder is one of `fewstep cache-latents`."""
    index = folder / "index.json"
    try:
        return "made_with" in read_json(index)
    except UserError:
        return False
