"""A Wan student that is told where its jumps end, in AnyFlow's class: that class's pipeline tells it, step by step."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.sampling import Sampler
from fewstep.export.base import ExportRefused, Stock
from fewstep.export.levels import is_even
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.extras import ANGLE, values_of

SCHEDULER = "FlowMapEulerDiscreteScheduler"
CLASSES = {"WanPipeline": ("AnyFlowPipeline", "AnyFlowTransformer3DModel")}
"""(pipeline, network) that hand on a destination time, by the pipeline of a teacher whose weights they take."""
SINCE = "0.39.0"
"""The first diffusers with these classes."""
LOOP = "the loop that draws it stands in docs/export.md, and `fewstep sample` draws from the run itself"
GATE = 0.5
"""The class adds (1 - g) times the embedding of t to g times that of r; powers of two scale weights without rounding."""
SLOW = 0.1
"""Fastest sinusoid of 1000 r that the destination is read from, so that it is smooth between the trained ones."""


def require() -> None:
    """ExportRefused for a diffusers that has no such classes."""
    import diffusers

    names = (SCHEDULER, *(name for pair in CLASSES.values() for name in pair))
    absent = [name for name in names if not hasattr(diffusers, name)]
    if absent:
        raise ExportRefused(
            f"diffusers {version('diffusers')} has no {absent[0]}, which hands this student where its steps end; "
            f"install {SINCE} or newer, or export it at one step; {LOOP}"
        )


def flow_map_stock(process: Any, sampler: Sampler) -> Stock:
    """FlowMapEulerDiscreteScheduler at a sampler's levels; ExportRefused where diffusers lacks it or x0 is re-noised."""
    require()
    if sampler.kind != "map":
        raise ExportRefused(f"{SCHEDULER} goes on without fresh noise, this student takes {sampler.kind} steps; {LOOP}")
    n = len(sampler.steps)
    if is_even(sampler.steps):
        again = Sampler(kind="map", steps=sampler.steps)
        return Stock(SCHEDULER, {"shift": float(getattr(process, "shift", 1.0))}, {"num_inference_steps": n}, again)
    times = tuple(process.grid(torch.tensor(sampler.steps, dtype=torch.float64)).tolist())
    # shift 1: the sigmas of the call are the trained ones, a shift would move them once more.
    again = Sampler(kind="map", steps=times)
    return Stock(SCHEDULER, {"shift": 1.0}, {"sigmas": [float(f"{t:.9g}") for t in times]}, again)


def retold(index: dict[str, Any], component: str) -> dict[str, Any]:
    """A model_index.json of a pipeline of `CLASSES`: the parts that it takes, and its network's class."""
    import diffusers

    kinds = dict(CLASSES.values())
    parts = inspect.signature(getattr(diffusers, index["_class_name"]).__init__).parameters
    kept = {k: v for k, v in index.items() if k.startswith("_") or k in parts}
    return kept | {component: ["diffusers", kinds[index["_class_name"]]]}


def jumps_of(net: Denoiser, sampler: Sampler, most: int) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """(numbers of steps, t (n,), s (n,)): the jumps whose ends the export knows, one for each destination.

    Those of the sampler's own levels, and where these are even of even steps in its other trained numbers while they
    stay at most `most`. A network that is told the length of a jump has one answer for each pair of times: the sampler's
    own alone. So have uneven levels, whose scheduler does not shift the even ones as the process does.
    """
    process: Any = net.process
    own = len(sampler.steps)
    ways = dict(_ends(sampler.steps))
    counts = {own}
    alone = "length" in net.inputs or not is_even(sampler.steps)
    for count in () if alone else sorted(sampler.counts or ()):
        more = {s: t for s, t in _ends(tuple(1 - i / count for i in range(count))) if s not in ways}
        if len(ways) + len(more) <= most:
            ways |= more
            counts.add(count)
    grid = torch.tensor(list(ways.items()), dtype=torch.float64)
    return tuple(sorted(counts)), process.grid(grid[:, 1]), process.grid(grid[:, 0])


def known_row(net: Denoiser, sampler: Sampler, most: int) -> tuple[str, str]:
    """The card's row that tells at which steps the export knows where they end."""
    if not is_even(sampler.steps):
        return "steps whose ends it knows", f"its own {len(sampler.steps)} levels alone"
    counts = jumps_of(net, sampler, most)[0]
    return "numbers of even steps whose ends it knows", ", ".join(map(str, counts))


def _ends(levels: tuple[float, ...]) -> list[tuple[float, float]]:
    """(s, t) of every step."""
    return [(round(s, 12), t) for t, s in zip(levels, (*levels[1:], 0.0), strict=True)]


@torch.no_grad()
def flow_map_model(net: Denoiser, sampler: Sampler) -> nn.Module:
    """The student's network as AnyFlow's: Wan's weights, and an embedding of r that is the student's own of s.

    Its inputs' sum e(s) is added to the embedding of t (dim,); the class adds g MLP(sinusoids of 1000 r). The last layer
    of that MLP is the least one that gives e / g at the jumps of `jumps_of`, on a first layer of slow sinusoids.
    """
    import diffusers

    wrapper: Any = net.net
    cls: Any = getattr(diffusers, CLASSES[wrapper.pipeline][1])
    taken = inspect.signature(cls.__init__).parameters
    told = {k: v for k, v in dict(wrapper.config).items() if k in taken}
    model: Any = cls(**told, gate_value=GATE, deltatime_type="r")
    weights = dict(wrapper.model.state_dict())
    last = "condition_embedder.time_embedder.linear_2."
    weights |= {f"{last}{k}": weights[f"{last}{k}"] / (1 - GATE) for k in ("weight", "bias")}
    missing, unknown = model.load_state_dict(weights, strict=False)
    if unknown or any("delta_embedder" not in name for name in missing):
        odd = [*unknown, *(name for name in missing if "delta_embedder" not in name)]
        raise ExportRefused(f"{cls.__name__} has no place for {', '.join(odd[:3])} of this student; {LOOP}")
    embedder = model.condition_embedder
    first, second = embedder.delta_embedder.linear_1, embedder.delta_embedder.linear_2
    _, t, s = jumps_of(net, sampler, second.in_features // 2)
    read_slowly(first)
    hidden = embedder.act_fn(first(embedder.timesteps_proj(1000 * s).to(first.weight.dtype))).double()
    wanted = embedded(net, t, s, sampler.guidance) / GATE
    known = torch.cat((hidden, torch.ones_like(hidden[:, :1])), 1)
    found = torch.linalg.lstsq(known, wanted, driver="gelsd").solution
    second.weight.copy_(found[:-1].T)
    second.bias.copy_(found[-1])
    return model.eval()


def embedded(net: Denoiser, t: Tensor, s: Tensor, w: float | None) -> Tensor:
    """What the student's further inputs add to its embedding of time at jumps t -> s (n,); float64 (n, dim)."""
    extras: Any = net.net.extras
    scale = None if w is None else torch.full_like(t, w)
    values = values_of(net.process, net.inputs, t, s, scale, None)
    return extras.embed({n: ANGLE[n](net.process, v).to(torch.float32) for n, v in values.items()}).double()


def read_slowly(layer: nn.Linear) -> None:
    """Let every unit of a linear layer on diffusers' sinusoids (cosines, then sines) read one of the slow ones.

    Units beyond the first of each read it with other signs, slopes and offsets.
    """
    half = layer.in_features // 2
    slow = [j for j in range(half) if 10_000 ** (-j / half) <= SLOW]
    columns = [j + shift for j in reversed(slow) for shift in (0, half)]
    layer.weight.zero_()
    layer.bias.zero_()
    for unit in range(layer.out_features):
        turn, column = divmod(unit, len(columns))
        layer.weight[unit, columns[column]] = (-1) ** turn * (1 + turn / 2)
        layer.bias[unit] = turn / 2
