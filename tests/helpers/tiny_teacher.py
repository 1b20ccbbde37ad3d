"""Shared by the export and command-line tests: a diffusers teacher of a few thousand weights, and a student of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def tiny_unet(classes: int, seed: int, **settings: Any) -> Any:
    """An 8 x 8 grey UNet2DModel with random weights; beyond its classes it has the null class."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            add_attention=False,
            num_class_embeds=classes + 1 if classes else None,
            resnet_time_scale_shift="scale_shift",
            **settings,
        )


def make_teacher(folder: Path, classes: int = 10) -> Path:
    """A class-conditional pixel UNet with random weights, in a stock pipeline folder."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    unet = tiny_unet(classes, 3)
    ConsistencyModelPipeline(unet=unet, scheduler=CMStochasticIterativeScheduler()).save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def student_settings(teacher: Path) -> list[str]:
    """Changes to digits-dmd2 that make it a matter of a second."""
    return [
        f"teacher.path={teacher}",
        "discriminator.width=8",
        "method.critic.steps=1",
        "train.steps=2",
        "train.batch=6",
        "train.ema=[0.98]",
        "train.ema_warmup=10",
        "train.sample_every=0",
        "evaluate=null",
    ]


def make_run(folder: Path, teacher: Path, *settings: str) -> Path:
    """Two steps of DMD2 on digits from that teacher."""
    from fewstep.commands.claim import prepare
    from fewstep.recipe.store import load
    from fewstep.train.trainer import Trainer

    recipe = load("digits-dmd2", [*student_settings(teacher), *settings])
    prepare(recipe, folder, resume=False, force=False)
    Trainer(recipe, folder, cpu=True).fit()
    return folder
