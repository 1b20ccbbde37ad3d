"""Wrapper overhead: a denoiser's forward against the bare diffusers module called with the same arguments.

On one small random network of each class. The wrapper's own time is taken with the module's forward replaced by its
stored answer, because in turn the two differ by less than their scatter; `python -m fewstep.bench.wrappers [CLASS ...]`

Measured in CPU time on one core of an AMD EPYC, the others busy: 0.15 to 0.54 ms, which is 1.002 for UNet2DCondition,
1.004 DiT, 1.001 SD3, 1.004 Flux, 1.003 PixArt, 1.001 SANA times the bare module (in turn 1.008 to 1.033).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.process import DiscreteVP, Flow
from fewstep.bench.timing import in_turn, seconds_of
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.wrappers import WRAPPERS

ROUNDS = 8
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
    net = Denoiser(wrapper, Flow(), "velocity", "1000t") if flow else Denoiser(wrapper, DiscreteVP(), "eps", "index")
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
def overhead(name: str, rounds: int = ROUNDS) -> tuple[float, float, float]:
    """(seconds of the wrapper without its module, of the module, median ratio of both in turn to the module)."""
    net, x, t, cond = build(name)
    module = bare(net, x, t, cond)
    model: Any = net.net.model  # type: ignore[union-attr]
    whole, answer = lambda: net(x, t, cond), module()
    pairs = in_turn(whole, module, rounds)
    model.forward = lambda *_a, **_k: answer
    alone = min(seconds_of(whole, 10) for _ in range(10))
    return alone, min(b for _, b in pairs), statistics.median(a / b for a, b in pairs)


def main() -> None:
    for name in sys.argv[1:] or CONFIGS:
        alone, module, ratio = overhead(name)
        print(
            f"{name:24} {1000 * module:7.1f} ms, the wrapper {1000 * alone:.2f} ms: {1 + alone / module:.3f}x "
            f"(in turn {ratio:.3f}x)"
        )


if __name__ == "__main__":
    main()
