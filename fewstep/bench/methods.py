"""What a method's step costs beside its network calls: `python -m fewstep.bench.methods [NAMES]`.

One step is recorded: every call of a network, with its inputs, whether it had a gradient or a tangent and whether
its output was backpropagated. The replay makes the same calls one after the other, forward, backward or forward
mode, on their own. Step and replay run in turn, so their ratio does not depend on the machine's speed at the time;
what it holds beyond 1 is sampling of noise, losses, clipping, optimisers and averages.

Measured on one thread of an AMD EPYC, digits, batch 64 (wall time of 25 recipes, 5 pairs each, another process on the
second core): median 1.05, CD 1.00, DMD2 1.06, sCM 1.05 and 1.4 times a CD step. Above 1.10, in CPU time with 6 pairs:
SiD 1.13, of whose step 95 % lies inside the networks' own passes all the same, and two students 1.13, since each has an
optimiser and averages for half a batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fewstep.bench.timing import in_turn
from fewstep.networks.adapters import active, lora_layers
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.heads import Discriminator, LogVar
from fewstep.networks.roles import Roles
from fewstep.objectives.trajectory import tangent
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load
from fewstep.train.live import allocated
from fewstep.train.trainer import Trainer

SETTINGS = ("train.steps=1000000", "train.log_every=1000000", "train.sample_every=0", "train.ema=[0.98]")


@dataclass
class Call:
    """One call of a network within a step."""

    role: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    adapter: str | None
    graph: bool
    """A graph was recorded."""
    trained: bool
    """Its weights asked for a gradient."""
    moving: bool
    """It ran in forward mode."""
    used: list[bool] = field(default_factory=list)
    """Which of its outputs were backpropagated."""

    def run(self) -> None:
        """The same call alone."""
        weights = list(self.module.parameters())
        if weights and weights[0].requires_grad is not self.trained:
            for p in weights:
                p.requires_grad_(self.trained)
        layers = lora_layers(self.module)
        with active(layers, *([self.adapter] if self.adapter else [])):
            if self.moving:
                self._jvp()
                return
            with torch.set_grad_enabled(self.graph):
                outputs = _tensors(self.module(*self.args, **self.kwargs))
            kept = [o for o, used in zip(outputs, self.used, strict=True) if used]
            if kept:
                torch.autograd.backward(kept, [torch.ones_like(o) for o in kept])

    def _jvp(self) -> None:
        x, t, *rest = self.args

        def raw(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
            return self.module(x, t, *rest, **self.kwargs)[0]

        tangent(raw, (x, t, t), (torch.ones_like(x), torch.ones_like(t), None))


def networks(roles: Roles) -> dict[nn.Module, str]:
    """The modules whose calls count, with the role that owns them: networks, heads, exact teachers."""
    found: dict[nn.Module, str] = {}
    for role, module in roles.items():
        for m in module.modules():
            if isinstance(m, Denoiser):
                found.setdefault(m.net, role)
            elif isinstance(m, Discriminator):
                found.update({head: role for head in m.heads.values()})
            elif isinstance(m, LogVar) or type(m).__module__ == "fewstep.networks.analytic":
                found.setdefault(m, role)
    return found


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of a network's output, in a fixed order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [t for value in output.values() for t in _tensors(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in _tensors(value)]
    inner = [getattr(output, name) for name in ("x0", "eps") if isinstance(getattr(output, name, None), Tensor)]
    return inner


def _bare(value: Any) -> Any:
    """A value without graph, tangent and functorch's wrapping, but asking for a gradient where it did."""
    if isinstance(value, dict):
        return {k: _bare(v) for k, v in value.items()}
    if not isinstance(value, Tensor):
        return value
    asks, moving = value.requires_grad, torch._C._functorch.is_functorch_wrapped_tensor(value)
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    # Inside a transform even a clone would be wrapped again.
    with torch._C._DisableFuncTorch():
        plain = forward_ad.unpack_dual(value).primal.detach().clone()
        return plain if moving or not asks else plain.requires_grad_()


def _is_moving(values: Sequence[Any]) -> bool:
    return any(isinstance(v, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(v) for v in values)


@contextmanager
def recording(roles: Roles) -> Iterator[list[Call]]:
    """Every network call made inside, in order."""
    calls: list[Call] = []
    handles: list[Any] = []

    def before(role: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layers = lora_layers(module)
            chosen = layers[0]._active_adapter if layers and not layers[0]._disable_adapters else []
            moving, graph = _is_moving(args), torch.is_grad_enabled()
            trained = any(p.requires_grad for p in module.parameters())
            bare, named = tuple(_bare(a) for a in args), {k: _bare(v) for k, v in kwargs.items()}
            calls.append(Call(role, module, bare, named, chosen[0] if chosen else None, graph, trained, moving))

        return hook

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = next(c for c in reversed(calls) if c.module is module and not c.used)
        outputs = _tensors(output)
        call.used = [False] * len(outputs)
        for i, o in enumerate(outputs):
            if o.requires_grad and not call.moving:
                o.register_hook(lambda _, i=i: call.used.__setitem__(i, True))

    try:
        for module, role in networks(roles).items():
            handles.append(module.register_forward_pre_hook(before(role), with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Cost:
    """One method's step. Times are medians in milliseconds; `ratio` is the median over pairs of step and calls."""

    recipe: str
    method: str
    batch: int
    forward: int
    """Calls of networks of any role and size, heads included."""
    backward: int
    moving: int
    """Calls in forward mode."""
    step_ms: float
    calls_ms: float
    ratio: float
    relative: float | None = None
    """Median over pairs of its step and another recipe's (`--against`)."""


def prepare(name: str, settings: Sequence[str] = ()) -> tuple[Trainer, Callable[[], None]]:
    """A trainer at the second step of the recipe's last stage, and that step as a function that may be repeated."""
    recipe = load(name, [*SETTINGS, *settings])
    trainer = Trainer(recipe, cpu=not torch.cuda.is_available())
    stage = recipe.stages()[-1]
    trainer.progress.stage = len(recipe.before)
    trainer.loop.begin(stage)
    # Step 1: what comes at every n-th step (R1, curricula's first) has been at step 0.
    trainer.progress.step = 1

    return trainer, lambda: trainer.loop.step(stage)


def replay_of(trainer: Trainer, step: Callable[[], None]) -> tuple[list[Call], Callable[[], None]]:
    """The network calls of a step, and a function that makes them alone."""
    with recording(trainer.roles) as calls:
        step()
    modules = list(networks(trainer.roles))

    def replay() -> None:
        for call in calls:
            call.run()
        for module in modules:
            for p in module.parameters():
                p.grad = None

    return calls, replay


def cost(name: str, settings: Sequence[str] = (), rounds: int = 8, other: Callable[[], None] | None = None) -> Cost:
    """Measure one recipe's method; `other` is a step of another recipe to compare it with."""
    trainer, step = prepare(name, settings)
    step()
    calls, replay = replay_of(trainer, step)
    replay()
    pairs = in_turn(step, replay, rounds)
    relative = statistics.median(a / b for a, b in in_turn(step, other, rounds)) if other else None
    method: Any = trainer.recipe.method
    return Cost(
        name,
        method.name,
        trainer.recipe.train.batch,
        len(calls),
        sum(any(c.used) for c in calls),
        sum(c.moving for c in calls),
        1000 * statistics.median(a for a, _ in pairs),
        1000 * statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
        relative,
    )


def checkpointing_memory(name: str = "digits-sid", settings: Sequence[str] = ()) -> tuple[float, float]:
    """MiB of tensors at the worst moment of a step, without and with activation checkpointing."""
    sizes = []
    for switch in ("false", "true"):
        _, step = prepare(name, [*settings, f"train.checkpointing={switch}"])
        step()
        sizes.append(allocated(step) / 2**20)
    return sizes[0], sizes[1]


def main(argv: Sequence[str] = ()) -> None:
    """Print one table and write it as JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.bench.methods", description=__doc__)
    parser.add_argument("names", nargs="*", help="recipes; every digits recipe when left out")
    parser.add_argument("--rounds", type=int, default=8, help="pairs of step and replay")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes to every recipe")
    parser.add_argument("--against", metavar="NAME", help="a recipe whose step each one's is divided by")
    parser.add_argument("--out", type=Path, default=Path("methods-bench.jsonl"))
    given = parser.parse_args(argv)
    names = given.names or [n for n in shipped() if n.startswith("digits-")]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}")
    other = prepare(given.against, given.set)[1] if given.against else None
    if other:
        other()
    head = f"{'recipe':26}{'calls':>7}{'back':>6}{'jvp':>5}{'step ms':>10}{'calls ms':>10}{'ratio':>8}"
    print(head + (f"  step / {given.against}" if other else ""))
    with given.out.open("a") as out:
        for name in names:
            c = cost(name, given.set, given.rounds, other)
            out.write(json.dumps({**asdict(c), "device": where, "torch": torch.__version__}) + "\n")
            row = f"{c.recipe:26}{c.forward:>7}{c.backward:>6}{c.moving:>5}{c.step_ms:>10.1f}{c.calls_ms:>10.1f}"
            beside = "" if c.relative is None else f"{c.relative:>10.2f}"
            print(f"{row}{c.ratio:>8.3f}{beside}", flush=True)
        plain, saved = checkpointing_memory(settings=given.set)
        print(f"SiD step, digits: {plain:.0f} MiB, with activation checkpointing {saved:.0f} MiB")
        out.write(json.dumps({"recipe": "digits-sid", "mib": plain, "mib_checkpointing": saved}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
