"""Adapters on one base against full copies, what switching them costs, cached against live encoders.

python -m fewstep.bench.adapters memory | switching | encoders [--size NAME] [--batch N] [--layout pixart]
Random weights: nothing is loaded. Each number is printed with what it was taken on.

Measured on one core of an AMD EPYC (a training run on the other): a DMD2 step on the `scaled` UNet, batch 1, peaks at
3659 MiB with two adapters and 7518 MiB with three networks, ratio 0.49; with --checkpointing 2537 and 7139 MiB, 0.36
(`small`, whose activations outweigh its weights: 0.58 and 0.48). Switching 0.38 % of a step of `small`. Cached against
live encoders in PixArt-alpha's proportions 0.33.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.process import DiscreteVP
from fewstep.bench.timing import in_turn, seconds_of
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import DMD2
from fewstep.networks import adapters
from fewstep.networks.adapters import Adapted, enable_checkpointing, frozen, plain_copy
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.roles import Roles
from fewstep.networks.wrappers import PixArt
from fewstep.networks.wrappers.unet_condition import UNetCondition
from fewstep.recipe.schema import AdamW
from fewstep.train.live import Live, bytes_of
from fewstep.train.optim import TurnOptimizer

MIB = 2**20
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"channels": (8, 16), "depth": (0, 1), "text": 12, "side": 8, "groups": 4, "head": 4},
    "small": {
        "channels": (64, 128, 256),
        "depth": (0, 1, 2),
        "text": 256,
        "side": 32,
        "groups": 32,
        "head": 32,
    },
    "scaled": {
        "channels": (96, 192, 384),
        "depth": (0, 2, 10),
        "text": 640,
        "side": 72,
        "groups": 32,
        "head": 64,
    },
    "sdxl": {
        "channels": (320, 640, 1280),
        "depth": (0, 2, 10),
        "text": 2048,
        "side": 128,
        "groups": 32,
        "head": 64,
    },
}
"""UNets in SDXL's layout: no attention at the finest level, deeper transformers below.

`scaled` has SDXL's proportions for a CPU: its depths, 0.3 of its width, and so 0.09 of its weights and, with 0.3 of
its latent pixels, 0.09 of its activations.
"""
TOKENS = 77


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place() -> str:
    """What the numbers are taken on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def teacher(size: str) -> Denoiser:
    """A frozen text-conditional UNet of random weights."""
    from diffusers import UNet2DConditionModel

    s = SIZES[size]
    down = tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in s["depth"])
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=s["side"],
        block_out_channels=s["channels"],
        down_block_types=down,
        up_block_types=tuple(n.replace("Down", "Up") for n in down[::-1]),
        layers_per_block=2,
        transformer_layers_per_block=tuple(max(d, 1) for d in s["depth"]),
        attention_head_dim=tuple(c // s["head"] for c in s["channels"]),
        cross_attention_dim=s["text"],
        norm_num_groups=s["groups"],
        use_linear_projection=True,
    )
    return frozen(Denoiser(UNetCondition(model), DiscreteVP(), "eps", "index")).to(device())  # type: ignore[return-value]


class Step:
    """DMD2 without a GAN on roles of one kind: `full` copies, or two `adapters` on the teacher."""

    def __init__(self, kind: str, size: str, batch: int, checkpointing: bool) -> None:
        base = teacher(size)
        if kind == "full":
            student, critic = (plain_copy(base).to(device()) for _ in range(2))
        else:
            student, critic = (Adapted(base, name, rank=64, alpha=8.0) for name in ("student", "critic"))
            for role in (student, critic):
                role.to(device())
        if checkpointing:
            for role in (student, critic):
                enable_checkpointing(role)
        self.roles = Roles(teacher=base, student=student, critic=critic)
        self.method = DMD2(gan=None, critic=Critic(weight="eps"), guidance=8.0)
        self.size, self.batch, self.number = SIZES[size], batch, 0
        self.optimizers: dict[tuple[str, ...], TurnOptimizer] = {}
        self.on_cuda = torch.cuda.is_available()

    def condition(self, draws: Draws) -> dict[str, Tensor]:
        return {"text": draws.normal(TOKENS, self.size["text"])}

    def __call__(self) -> None:
        self.number += 1
        side = self.size["side"]
        for k, turn in enumerate(self.method.turns(self.roles, self.number)):
            self.roles.train_only(*turn.updates)
            draws = Draws(fold("bench", self.number, k), torch.arange(self.batch, device=device()))
            cond = self.condition(draws)
            null = {key: torch.zeros_like(v) for key, v in cond.items()}
            with torch.autocast(device().type, torch.bfloat16, enabled=self.on_cuda):
                for losses in turn.losses(Batch(draws, (4, side, side), None, cond, null)):
                    losses.total().backward()
            if turn.updates not in self.optimizers:
                specs = {name: AdamW(lr=1e-6) for name in turn.updates}
                self.optimizers[turn.updates] = TurnOptimizer(self.roles, turn.updates, specs, 100)
            self.optimizers[turn.updates].step()
            self.optimizers[turn.updates].zero()

    def peak(self) -> int:
        """Bytes of tensors at the worst moment of a step."""
        self()
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
            self()
            return torch.cuda.max_memory_allocated()
        stay = [t for m in self.roles.values() for t in (*m.parameters(), *m.buffers())]
        stay += [v for o in self.optimizers.values() for s in o.adam.state.values() for v in s.values() if v.ndim]
        with Live(stay) as live:
            self()
        return bytes_of(stay) + live.peak


def memory(given: argparse.Namespace) -> None:
    """Peak of a DMD2 step, each kind in a process of its own."""
    peaks = {}
    for kind in ("full", "adapters"):
        command = [sys.executable, "-m", "fewstep.bench.adapters", f"peak-{kind}", "--size", given.size]
        command += ["--batch", str(given.batch)] + ["--checkpointing"] * given.checkpointing
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        peaks[kind] = json.loads(done.stdout.splitlines()[-1])
        print(f"{kind}: {peaks[kind] / MIB:.0f} MiB", flush=True)
    ratio = peaks["adapters"] / peaks["full"]
    print(
        f"DMD2 step, {given.size} UNet, batch {given.batch}, {place()}: three full networks {peaks['full'] / MIB:.0f} "
        f"MiB, two adapters on one base {peaks['adapters'] / MIB:.0f} MiB, ratio {ratio:.2f}"
    )


def switching(given: argparse.Namespace) -> None:
    """Time of choosing adapters within a step, against the step."""
    step = Step("adapters", given.size, given.batch, False)
    layers, calls, inside = step.roles.student.layers, [0], adapters.active

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        return inside(*arguments)

    adapters.active = counted  # type: ignore[assignment]
    step()
    adapters.active = inside  # type: ignore[assignment]
    whole = _median(step, given.repeats)
    one = _median(lambda: _switch(layers), 50)
    print(
        f"{given.size} UNet, batch {given.batch}, {place()}: {calls[0]} switches of {len(layers)} layers a step, "
        f"{1e6 * one:.0f} us each, {100 * calls[0] * one / whole:.2f} % of a step of {1000 * whole:.1f} ms"
    )


def _switch(layers: Any) -> None:
    with adapters.active(layers, "student"):
        pass


class Encoders(nn.Module):
    """A text encoder and a VAE, run as one on tokens (b, n) and pictures (b, 3, h, w)."""

    def __init__(self, text: nn.Module, vae: nn.Module) -> None:
        super().__init__()
        self.text, self.vae = text, vae

    @torch.no_grad()
    def forward(self, tokens: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return self.text(tokens).last_hidden_state, self.vae.encode(pictures).latent_dist.mean


def _vae(channels: tuple[int, ...], **options: int) -> nn.Module:
    from diffusers import AutoencoderKL

    n = len(channels)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n}
    return AutoencoderKL(block_out_channels=channels, **blocks, **options)


def clip_and_vae(size: str) -> Encoders:
    """CLIP and a VAE of random weights, of Stable Diffusion's sizes or tiny."""
    from transformers import CLIPTextConfig, CLIPTextModel

    s = SIZES[size]
    wide = size == "sdxl"
    text = CLIPTextConfig(
        hidden_size=s["text"],
        intermediate_size=4 * s["text"],
        num_hidden_layers=24 if wide else 2,
        num_attention_heads=16 if wide else 2,
        vocab_size=49408 if wide else 100,
    )
    channels = (128, 256, 512, 512) if wide else (s["groups"],) * 2
    vae = _vae(channels, norm_num_groups=32 if wide else s["groups"], layers_per_block=2 if wide else 1)
    return Encoders(CLIPTextModel(text), vae)


def t5_and_vae() -> Encoders:
    """PixArt-alpha's T5-XXL (24 layers of 4096) and 8x VAE, a quarter as wide, the text encoder a quarter as deep."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 1024, "d_ff": 2560, "num_layers": 6, "num_heads": 16, "d_kv": 64}
    text = T5EncoderModel(T5Config(vocab_size=100, feed_forward_proj="gated-gelu", **sizes))
    return Encoders(text, _vae((32, 64, 128, 128), layers_per_block=2))


def pixart() -> Denoiser:
    """PixArt-XL/2 (28 layers of 1152) at 256 pixels, a quarter as wide and deep."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "attention_head_dim": 72, "num_layers": 7}
    model = PixArtTransformer2DModel(
        **heads,
        sample_size=32,
        cross_attention_dim=288,
        caption_channels=1024,
        use_additional_conditions=False,
    )
    return Denoiser(PixArt(model), DiscreteVP(), "eps", "index")


def encoders(given: argparse.Namespace) -> None:
    """A student's denoising step on cached tensors, and with both encoders run in it."""
    where = device()
    live: Any
    if given.layout == "pixart":
        live, student, name = t5_and_vae(), pixart(), "PixArt-alpha at a quarter"
        count, latent = 120, 32
    else:
        live, student, name = clip_and_vae(given.size), plain_copy(teacher(given.size)), f"{given.size} UNet"
        count, latent = TOKENS, SIZES[given.size]["side"]
    student, live = student.to(where).requires_grad_(True), live.to(where).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)
    g = torch.Generator().manual_seed(0)
    side = latent * 2 ** (len(live.vae.config.block_out_channels) - 1)
    tokens = torch.randint(0, 99, (given.batch, count), generator=g).to(where)
    pictures = torch.randn(given.batch, 3, side, side, generator=g).to(where)
    kept = live(tokens, pictures)
    t = torch.full((given.batch,), 500.0, dtype=torch.float64, device=where)

    def step(text: Tensor, z: Tensor) -> None:
        with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
            loss = (student(z, t, {"text": text}).x0 - z).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    on_cache, on_live = lambda: step(*kept), lambda: step(*live(tokens, pictures))
    on_cache(), on_live()
    pairs = in_turn(on_cache, on_live, given.repeats)
    cached, both = (statistics.median(p[i] for p in pairs) for i in range(2))
    print(
        f"{name}, batch {given.batch}, {place()}: {1000 * cached:.1f} ms a step on cached text and latents, "
        f"{1000 * both:.1f} ms with live encoders, ratio {statistics.median(a / b for a, b in pairs):.2f}"
    )


def _median(run: Callable[[], object], repeats: int) -> float:
    run()
    return statistics.median(seconds_of(run) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.bench.adapters")
    parser.add_argument("what", choices=["memory", "switching", "encoders", "peak-full", "peak-adapters"])
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument(
        "--layout",
        choices=["unet", "pixart"],
        default="unet",
        help="of `encoders`: pixart has real proportions",
    )
    given = parser.parse_args()
    if given.what.startswith("peak-"):
        step = Step(given.what.removeprefix("peak-"), given.size, given.batch, given.checkpointing)
        print(json.dumps(step.peak()))
        return
    {"memory": memory, "switching": switching, "encoders": encoders}[given.what](given)


if __name__ == "__main__":
    main()
