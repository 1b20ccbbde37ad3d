"""Writes docs/plans.json: `fewstep plan` of recipes by `fewstep new` on folders with the real sizes and no real weights.

`python docs/plans.py FOLDER` needs some 20 GiB of main memory and of disk for its folder, and an hour of one core;
`python docs/plans.py --configs [NAME..]` plans from the shipped configs alone, in 1 GiB and under a minute each.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from fewstep.bench.stand_ins import save_vae, without_text_encoders
from fewstep.commands.new import Wish, new
from fewstep.commands.new_lines import rendered
from fewstep.commands.new_memory import SETS
from fewstep.commands.new_pipeline import look, student
from fewstep.commands.plan import plan
from fewstep.commands.plan_configs import Sizes, shipped
from fewstep.recipe.store import load

SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
SD3: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
"""The published configs of SDXL base 1.0 and SD3 medium; SD1.5 is the class's own defaults."""
FAMILIES: dict[str, tuple[str, str, Callable[[], Any], int]] = {
    "SD1.5": (
        "StableDiffusionPipeline", "unet",
        lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8), 4,
    ),
    "SDXL": ("StableDiffusionXLPipeline", "unet", lambda: UNet2DConditionModel(sample_size=128, **SDXL), 4),
    "SD3 medium": (
        "StableDiffusion3Pipeline", "transformer", lambda: SD3Transformer2DModel(sample_size=128, **SD3), 16,
    ),
}  # fmt: skip
SETTINGS = (
    ("LoRA sets", True, ()),
    ("whole networks", False, ()),
    ("LoRA sets, bf16 base", True, ("teacher.dtype=bf16",)),
)


def folder_of(root: Path, name: str) -> Path:
    """A pipeline's folder whose weights are zeros."""
    kind, part, make, channels = FAMILIES[name]
    folder = root / name.replace(" ", "-").lower()
    if (folder / "model_index.json").is_file():  # written last
        return folder
    with torch.device("meta"):
        network = make()
    network = network.to(torch.bfloat16).to_empty(device="cpu")
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data.zero_()
    network.save_pretrained(folder / part)
    flow = part == "transformer"
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0) if flow else DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )  # fmt: skip
    scheduler.save_pretrained(folder / "scheduler")
    shift = {"shift_factor": 0.0609} if flow else {}
    save_vae(folder / "vae", channels, **shift)
    held = {"unet" if not flow else "transformer": ["diffusers", type(network).__name__]}
    held |= {"scheduler": ["diffusers", type(scheduler).__name__], "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind, **held}))
    return folder


def rows(root: Path) -> Iterator[dict[str, Any]]:
    """A row for every family and setting that fits into this machine."""
    prompts = root / "prompts.txt"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(32)))
    for name in FAMILIES:
        folder = folder_of(root, name)
        without_text_encoders(look(str(folder)).wrapper, name)
        for settings, lora, changes in SETTINGS:
            if not lora and name != "SD1.5":
                continue  # three whole networks of these do not fit into this machine's memory
            out = root / "mine.yaml"
            list(new(Wish(out, 4, teacher=str(folder), lora=lora, prompts=prompts, force=True)))
            made = plan(load(str(out), [f"data.text_cache={root / 'cache'}", *changes]), ways=False)
            row = {"family": name, "settings": settings, "micro_batch": made.micro_batch, "gib": made.total / 2**30}
            print(row, flush=True)
            yield row


def from_configs(name: str, root: Path) -> dict[str, Any]:
    """LoRA sets on a bf16 base, one sample at a time, at the family's own size and text."""
    prompts, file = root / "prompts.txt", root / "mine.yaml"
    prompts.write_text("a prompt\n")
    family = look(f"assets:configs/{name}")
    file.write_text(rendered(student(family, "dmd2", 4, fit=SETS[-1], prompts=prompts, latents=None)))
    made = plan(load(str(file)), ways=False, sizes=Sizes())
    weights, shape = made.roles["teacher"].weights / 2**30, "x".join(map(str, family.shape))
    row = {"configs": name, "shape": shape, "weights_gib": weights, "gib": made.total / 2**30}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    file = Path(__file__).with_name("plans.json")
    told = json.loads(file.read_text())
    if sys.argv[1] == "--configs":
        wanted = sys.argv[2:] or [folder.name for folder in shipped().values()]
        kept = {row["configs"]: row for row in told.get("configs", [])}
        with tempfile.TemporaryDirectory() as inside:
            for name in wanted:
                kept[name] = from_configs(name, Path(inside))
                told["configs"] = [kept[key] for key in sorted(kept)]
                file.write_text(json.dumps(told, indent=1) + "\n")
    else:
        place = Path(sys.argv[1])
        place.mkdir(parents=True, exist_ok=True)
        told["rows"] = []
        for made in rows(place):
            told["rows"].append(made)
            file.write_text(json.dumps(told, indent=1) + "\n")
