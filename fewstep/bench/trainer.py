"""Trainer overhead: a DMD2 step of the digits recipe against a hand-written loop of the same mathematics.

Both run in turn in one process, so the ratio does not depend on the machine's speed at the time. Peak memory is
what torch's allocator holds at the worst moment of a warm step; the growth of the resident set, in a process of its
own for each, is printed beside it: it adds what malloc fragments and what the first step imports.

    python -m fewstep.bench.trainer       both tables
    python -m fewstep.bench.trainer time  the time ratio only
"""

from __future__ import annotations

import copy
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.bench.timing import in_turn
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load
from fewstep.train.live import allocated
from fewstep.train.trainer import Trainer

SETTINGS = ["train.batch=64", "train.steps=1000000", "train.log_every=1000000"]


def ours(recipe: Recipe) -> Callable[[], None]:
    """One step of the trainer."""
    trainer = Trainer(recipe, cpu=True)
    stage = recipe.stages()[-1]
    trainer.loop.begin(stage)

    def step() -> None:
        trainer.loop.step(stage)
        trainer.progress.step += 1

    return step


def by_hand(recipe: Recipe) -> Callable[[], None]:
    """The same networks, losses, optimisers and averages, written as one function without fewstep's spine."""
    trainer = Trainer(recipe, cpu=True)
    m: Any = recipe.method
    student, critic, teacher = (copy.deepcopy(trainer.roles[r].net.model) for r in ("student", "critic", "teacher"))
    head: nn.Module = copy.deepcopy(trainer.roles.discriminator.heads["mid"])  # type: ignore[union-attr,index]
    images, labels = trainer.data.all()
    assert labels is not None
    low, high, rho, data = 0.002, 80.0, 7.0, 0.5
    adam_s = _adam([(student, recipe.optimizer("student"))])
    adam_c = _adam([(critic, recipe.optimizer("critic")), (head, recipe.optimizer("discriminator"))])
    average = [p.detach().clone() for p in student.parameters()]
    updates = [0]
    b = recipe.train.batch

    def denoise(net: Any, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        s = t[:, None, None, None]
        skip = data**2 / ((s - low) ** 2 + data**2)
        out = (s - low) * data / (s**2 + data**2).sqrt()
        return skip * x + out * net(x / (s**2 + data**2).sqrt(), 250 * t.log(), class_labels=c, return_dict=False)[0]

    def encode(net: Any, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        embedding = net.time_embedding(net.time_proj(250 * t.log())) + net.class_embedding(c)
        h = net.conv_in(x / (t[:, None, None, None] ** 2 + data**2).sqrt())
        for block in net.down_blocks:
            h, _ = block(hidden_states=h, temb=embedding)
        return net.mid_block(h, embedding)

    def lognormal(dist: Any) -> Tensor:
        return (dist.mean + dist.std * torch.randn(b)).exp().clamp(low, high)

    def batch() -> tuple[Tensor, Tensor]:
        k = torch.randint(len(images), (b,))
        return images[k], labels[k]

    def karras(u: Tensor) -> Tensor:
        return (low ** (1 / rho) + u * (high ** (1 / rho) - low ** (1 / rho))) ** rho

    def step() -> None:
        _require([student], [critic, head, teacher])
        real, c = batch()
        x = denoise(student, high * torch.randn_like(real), torch.full((b,), high), c)
        t = karras(m.times.low + (m.times.high - m.times.low) * torch.rand(b))
        noisy = x.detach() + t[:, None, None, None] * torch.randn_like(x)
        with torch.no_grad():
            d_real, d_fake = denoise(teacher, noisy, t, c), denoise(critic, noisy, t, c)
        scale = (x.detach() - d_real).abs().mean((1, 2, 3), keepdim=True)
        g = (d_fake - d_real) / scale
        match = 0.5 * F.mse_loss(x, (x - g).detach())
        t = lognormal(m.gan.times)
        logit = head(encode(teacher, x + t[:, None, None, None] * torch.randn_like(x), t, c))
        (match + m.gan.weight * F.softplus(-logit).mean()).backward()
        _clipped_step(adam_s, recipe.train.clip)
        _require([critic, head], [student, teacher])
        for repeat in range(m.critic.steps):
            real, labels_now = batch()
            if repeat or not m.share_rollout:
                c = labels_now
                with torch.no_grad():
                    x = denoise(student, high * torch.randn_like(real), torch.full((b,), high), c)
            x = x.detach()
            t = lognormal(m.critic.times)
            d = denoise(critic, x + t[:, None, None, None] * torch.randn_like(x), t, c)
            dsm = (((d - x) ** 2).mean((1, 2, 3)) * (t**2 + data**2) / (t * data) ** 2).mean()
            logits = []
            for seen in (real, x):
                t = lognormal(m.gan.times)
                logits.append(head(encode(teacher, seen + t[:, None, None, None] * torch.randn_like(x), t, c)))
            loss = F.softplus(logits[1]).mean() + F.softplus(-logits[0]).mean()
            (dsm + m.gan.discriminator_weight * loss).backward()
            _clipped_step(adam_c, recipe.train.clip)
        with torch.no_grad():
            decay = min(recipe.train.ema[0], (1 + updates[0]) / (recipe.train.ema_warmup + updates[0]))
            torch._foreach_lerp_(average, [p.detach() for p in student.parameters()], 1 - decay)
        updates[0] += 1

    return step


def _adam(groups: list[tuple[nn.Module, Any]]) -> torch.optim.AdamW:
    specs = [{"params": list(n.parameters()), "lr": s.lr, "betas": s.betas, "weight_decay": 0.0} for n, s in groups]
    return torch.optim.AdamW(specs, fused=True)


def _clipped_step(adam: torch.optim.AdamW, clip: float) -> None:
    norm = nn.utils.clip_grad_norm_([p for g in adam.param_groups for p in g["params"]], clip)
    if torch.isfinite(norm):
        adam.step()
    adam.zero_grad(set_to_none=True)


def _require(trained: list[nn.Module], frozen: list[nn.Module]) -> None:
    for wanted, nets in ((True, trained), (False, frozen)):
        for net in nets:
            net.requires_grad_(wanted)


def time_ratio(rounds: int = 12) -> tuple[float, float, float]:
    """(median of pairwise ratios, median seconds of ours, of the hand-written loop)."""
    recipe = load("digits-dmd2", SETTINGS)
    a, b = ours(recipe), by_hand(recipe)
    a(), b()
    pairs = in_turn(a, b, rounds, repeat=2)
    return (
        statistics.median(x / y for x, y in pairs),
        statistics.median(x for x, _ in pairs),
        statistics.median(y for _, y in pairs),
    )


def _peak(which: str) -> None:
    recipe = load("digits-dmd2", [*SETTINGS, "train.batch=512"])
    step = {"ours": ours, "hand": by_hand}[which](recipe)
    before = _resident()
    step(), step()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(json.dumps({"tensors": allocated(step), "resident": grown}))


def _resident() -> int:
    """Resident set now, in KiB (Linux)."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize() // 1024


def memory() -> dict[str, tuple[float, float]]:
    """MiB of ours and of the hand-written loop, by {"tensors", "resident"}; a process each."""
    command = [sys.executable, "-m", "fewstep.bench.trainer"]
    ours, hand = (
        json.loads(subprocess.run([*command, w], capture_output=True, check=True).stdout) for w in ("ours", "hand")
    )
    return {k: (ours[k] / 2**20, hand[k] / 2**20) for k in ours}


def main() -> None:
    if sys.argv[1:] in (["ours"], ["hand"]):
        _peak(sys.argv[1])
        return
    ratio, a, b = time_ratio()
    print(f"DMD2 step, digits: {1000 * a:.0f} ms, by hand {1000 * b:.0f} ms, ratio {ratio:.3f}")
    if sys.argv[1:] != ["time"]:
        for what, (a, b) in memory().items():
            print(f"peak memory of that step at batch 512, {what}: {a:.0f} MiB, by hand {b:.0f} MiB, {a / b:.3f}")


if __name__ == "__main__":
    main()
