"""A UNet2DModel known from its config alone, without diffusers: the layers that an export folds into, and no others."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""What UNet2DModel takes where its config is silent (diffusers 0.42)."""
_KNOWN: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu",),
    "attn_norm_num_groups": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
"""Values at which the constructor is known to succeed and to make these layers."""
_BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}


class UNetOutline(nn.Module):
    """conv_in, time_embedding and class_embedding of a UNet2DModel, on torch's meta device, with its config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        c = self.config
        first = c.block_out_channels[0]
        width = c.time_embedding_dim or 4 * first
        with torch.device("meta"):
            self.conv_in = nn.Conv2d(c.in_channels, first, 3, padding=1)
            self.time_embedding = nn.Module()
            self.time_embedding.linear_1 = nn.Linear(first, width)
            self.time_embedding.linear_2 = nn.Linear(width, width)
            # nn.Embedding would draw normal numbers, for which torch imports its whole compiler on this device.
            rows = c.num_class_embeds and torch.empty(c.num_class_embeds, width)
            self.class_embedding = None if rows is None else nn.Embedding.from_pretrained(rows, freeze=False)

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device

    def register_to_config(self, **changes: Any) -> None:
        """Set keys of the config, as diffusers' models do."""
        self.config = SimpleNamespace(**vars(self.config) | changes)


def outline(config: Mapping[str, Any]) -> UNetOutline | None:
    """The outline of a UNet2DModel with this config; None where only its class can say what it makes of the config."""
    told = {key: value for key, value in config.items() if not key.startswith("_")}
    whole = copy.deepcopy(DEFAULTS) | told
    return UNetOutline(whole) if told.keys() <= DEFAULTS.keys() and _sound(whole) else None


def _sound(c: Mapping[str, Any]) -> bool:
    widths, groups = c["block_out_channels"], c["norm_num_groups"]
    counts = (c["in_channels"], c["out_channels"], c["layers_per_block"], groups, c["attention_head_dim"])
    optional = (c["time_embedding_dim"], c["num_class_embeds"])
    return (
        isinstance(widths, (list, tuple))
        and all(map(_count, (*widths, *counts)))
        and all(value is None or _count(value) for value in optional)
        and all(width % groups == 0 for width in widths)
        and all(c[key] in values for key, values in _KNOWN.items())
        and all(len(c[key]) == len(widths) > 0 and set(c[key]) <= set(kinds) for key, kinds in _BLOCKS.items())
    )


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


@contextmanager
def shapes() -> Iterator[None]:
    """Modules that are made within it have tensors of torch's meta device, and nothing is drawn for their weights.

    Drawing on that device makes torch import its whole compiler, and drawing elsewhere takes SDXL's time and memory.
    """
    inits = {name: f for name, f in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")}
    for name in inits:
        setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    try:
        with torch.device("meta"):
            yield
    finally:
        for name, f in inits.items():
            setattr(nn.init, name, f)


def whole(outline: UNetOutline) -> nn.Module:
    """The UNet2DModel of an outline with all its layers, on torch's meta device."""
    from diffusers import UNet2DModel

    with shapes():
        return UNet2DModel.from_config({k: v for k, v in vars(outline.config).items() if k in DEFAULTS})
