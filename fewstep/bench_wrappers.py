"""Wrapper overhead: a denoiser's forward against the bare diffusers module called with the same arguments.

Both run in turn in one process on one small random network of each class, so the ratio does not depend on the
machine's speed at the time. `python -m fewstep.bench_wrappers [CLASS ...]`

Measured on 2 threads of an AMD EPYC (2 cores, otherwise idle): UNet2DCondition 0.98, DiT 1.02, SD3 1.02, Flux 0.97,
PixArt 1.04, SANA 1.05 times the bare module.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.bench import in_turn
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.wrappers import WRAPPERS
from fewstep.process import DiscreteVP, Flow

ROUNDS = 40
SIZE = (32, 32)
_WIDE: dict[str, Any] = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {
        "sample_size": 32,
        "block_out_channels": (64, 128),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 256,
        "layers_per_block": 1,
    },
    "DiTTransformer2DModel": {**_WIDE, "in_channels": 4, "out_channels": 8, "sample_size": 32},
    "SD3Transformer2DModel": {
        **_WIDE,
        "sample_size": 32,
        "joint_attention_dim": 256,
        "caption_projection_dim": 256,
        "pooled_projection_dim": 128,
    },
    "FluxTransformer2DModel": {
        **_WIDE,
        "num_layers": 3,
        "num_single_layers": 6,
        "joint_attention_dim": 256,
        "pooled_projection_dim": 128,
        "axes_dims_rope": (16, 24, 24),
        "guidance_embeds": True,
    },
    "PixArtTransformer2DModel": {
        **_WIDE,
        "sample_size": 32,
        "cross_attention_dim": 256,
        "caption_channels": 256,
    },
    "SanaTransformer2DModel": {
        **_WIDE,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 64,
        "cross_attention_dim": 256,
        "caption_channels": 256,
    },
}
"""Small enough for a CPU, large enough that a forward takes tens of milliseconds."""


def build(name: str) -> tuple[Denoiser, Tensor, Tensor, Any]:
    """(denoiser, x, t, condition) for a class."""
    import diffusers

    torch.manual_seed(0)
    wrapper = WRAPPERS[name](getattr(diffusers, name)(**CONFIGS[name]))
    flow = wrapper.levels == "sigmas"
    net = (
        Denoiser(wrapper, Flow(), "velocity", "1000t")
        if flow
        else Denoiser(wrapper, DiscreteVP(), "eps", "index")
    )
    x, t = torch.randn(2, wrapper.channels(), *SIZE), net.process.grid(torch.tensor([0.3, 0.8]).double())
    return net.eval(), x, t, wrapper.example(2)


def bare(net: Denoiser, x: Tensor, t: Tensor, cond: Any) -> Callable[[], Any]:
    """The module with the very arguments that the wrapper calls it with."""
    seen: list[Any] = []
    model: Any = net.net.model  # type: ignore[union-attr]
    handle = model.register_forward_pre_hook(lambda _m, a, k: seen.append((a, k)), with_kwargs=True)
    net(x, t, cond)
    handle.remove()
    arguments, options = seen[0]
    return lambda: model(*arguments, **options)


@torch.no_grad()
def overhead(name: str, rounds: int = ROUNDS) -> tuple[float, float]:
    """(median ratio of wrapper to module, median seconds of the module)."""
    net, x, t, cond = build(name)
    calls = (lambda: net(x, t, cond), bare(net, x, t, cond))
    for call in calls:
        call()
    pairs = in_turn(*calls, rounds)
    return statistics.median(a / b for a, b in pairs), statistics.median(b for _, b in pairs)


def main() -> None:
    for name in sys.argv[1:] or CONFIGS:
        ratio, seconds = overhead(name)
        print(f"{name:24} {1000 * seconds:7.1f} ms, through the wrapper {ratio:.3f}x")


if __name__ == "__main__":
    main()
