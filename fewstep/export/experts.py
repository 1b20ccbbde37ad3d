"""Export of students that are several networks: one pipeline each, or the experts' weights with a documented loader.

No stock pipeline switches between two UNet2DModels on the way. (For video transformers one does: WanPipeline with
`transformer`, `transformer_2` and `boundary_ratio`.) So experts by time are written as plain diffusers models beside
a table of numbers, and the loop that applies it stands in the model card; the export runs that very text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.jump import clean, times_of
from fewstep.algebra.prediction import from_raw
from fewstep.algebra.rollout import renoise
from fewstep.algebra.sampling import gamma_step, sample
from fewstep.export.base import ExportRefused, Parts
from fewstep.export.card import student_card
from fewstep.export.fold import fold
from fewstep.export.latent import wrapped
from fewstep.export.routes import INSTEAD
from fewstep.networks.adapters import network_of, on_cpu
from fewstep.networks.denoiser import _TIME
from fewstep.networks.routed import ByClass, ByTime, Routed
from fewstep.train.product import Product

LOADER = """import json, torch
from diffusers import UNet2DModel
folder = "{folder}"
told = json.load(open(folder + "/steps.json"))
experts = [UNet2DModel.from_pretrained(folder + "/expert-%d" % k) for k in range(told["experts"])]

@torch.no_grad()
def draw(noise, labels=None):
    x = told["start"] * noise
    for step in told["steps"]:
        time = torch.tensor(step["time"])
        raw = experts[step["expert"]](step["c_in"] * x, time, class_labels=labels).sample
        x = step["x"] * x + step["raw"] * raw
        if step["noise"]:
            x = x + step["noise"] * torch.randn_like(x)
    return x.clamp(-1, 1)

images = draw(torch.randn(4, {shape}){labels})"""
"""The loader of the model card: a step is linear in the state, the network's output and fresh noise."""


def routed_parts(product: Product, parts_of: Callable[[Product], Parts]) -> Parts:
    """What a routed student is written as; `parts_of` tells it of one member. Errors as `choose.parts_of`."""
    net: Any = product.net
    if isinstance(net.route, ByClass):
        return _by_class(product, parts_of)
    if isinstance(net.route, ByTime):
        return _by_time(product)
    raise ExportRefused(f"a student routed by {type(net.route).__name__} is not written")


def _by_class(product: Product, parts_of: Callable[[Product], Parts]) -> Parts:
    net: Any = product.net
    count = len(net.members)
    groups: dict[str, list[int]] = {f"student-{k}": [] for k in range(count)}
    for c in range(product.classes):
        groups[f"student-{c * count // product.classes}"].append(c)
    members = {
        name: parts_of(
            replace(product, net=member, title=f"{product.title}, classes {group[0]}-{group[-1]}", example=group[0])
        )
        for member, (name, group) in zip(net.members, groups.items(), strict=True)
    }
    first, parts = next(iter(members.items()))
    return Parts(
        members=members,
        usage=lambda folder: parts.usage(f"{folder}/{first}"),
        card=partial(student_card, product, "pipeline per group of classes (classes.json)"),
        note=("classes.json", json.dumps(groups)),
    )


@torch.no_grad()
def table_of(net: Routed, sampler: Any, prediction: str, time_input: str) -> tuple[float, list[dict[str, Any]]]:
    """(scale of the start noise, one row per call): x' = row.x x + row.raw raw + row.noise z, all exact numbers."""
    process: Any = net.process
    times = times_of(sampler.steps, process)
    if sampler.kind == "map" and sampler.keep_noise:
        raise ExportRefused("experts with noise correction are not written; sample the run itself")
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    rows = []
    for i, t in enumerate(times):
        t, last = t.expand(1), i + 1 == len(times)
        s = clean(process, t) if last else times[i + 1].expand(1)

        def moved(x: Tensor, raw: Tensor, z: Tensor, t: Tensor = t, s: Tensor = s, last: bool = last) -> float:
            answer = from_raw(process, prediction, x, t, raw)
            if last:
                return float(answer.x0)
            if sampler.kind == "renoise":
                return float(renoise(process, answer.x0, z, s))
            return float(gamma_step(answer, s, sampler.eta, z) if sampler.kind == "gamma" else answer.at(s))

        scale = 1 / torch.sqrt(t**2 + process.sigma_data**2) if prediction in ("edm", "cm") else torch.ones(1)
        rows.append(
            {
                "expert": int(net.route(t, None)),
                "time": float(_TIME[time_input](process, t)),
                "c_in": float(scale),
                "x": moved(one, zero, zero),
                "raw": moved(zero, one, zero),
                "noise": moved(zero, zero, one),
            }
        )
    return float(process.prior(one, times[:1])), rows


def _by_time(product: Product) -> Parts:
    net: Any = product.net
    if any(wrapped(member) for member in net.members):
        first = net.members[0]
        kind = type(network_of(getattr(first, "base", first))).__name__
        raise ExportRefused(
            f"no stock pipeline hands over from one {kind} to another at a noise level, and the loader that "
            f"fewstep writes for experts is for UNet2DModels; {INSTEAD}"
        )
    one = replace(product.sampler, steps=product.sampler.steps[:1])
    plain = [fold(member, one)[0] for member in net.members]
    if any(m.takes_s for m in net.members) or plain[0].process != net.process:
        raise ExportRefused(
            "experts that take a destination time or speak another process than their teacher's are not "
            "written; sample the run itself"
        )
    start, rows = table_of(net, product.sampler, plain[0].prediction, plain[0].time_input)
    shape = ", ".join(map(str, product.shape))
    labels = f", torch.tensor({[i % product.classes for i in range(4)]})" if product.classes else ""

    def save(folder: Path) -> None:
        for k, expert in enumerate(plain):
            unet: Any = expert.net.model
            unet.save_pretrained(folder / f"expert-{k}", safe_serialization=True)

    def usage(folder: Path | str) -> str:
        return LOADER.format(folder=folder, shape=shape, labels=labels)

    def pairs(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
        yield _both(product, usage(folder))

    pipeline = (
        f"set of {len(plain)} UNet2DModels, one per interval of noise levels: no stock pipeline switches between two "
        "UNets, so the loop below does"
    )
    return Parts(
        save=save,
        pairs=pairs,
        usage=usage,
        card=partial(student_card, product, pipeline),
        note=("steps.json", json.dumps({"experts": len(plain), "start": start, "steps": rows}, indent=1)),
        differs="the loader differs from fewstep's sampler",
    )


@torch.no_grad()
def _both(product: Product, code: str, count: int = 8) -> tuple[Tensor, Tensor]:
    """(fewstep's, the loader's) images (count, c, h, w) in [-1, 1] from the same noises; runs the text of the card."""
    net: Any = product.net
    net = Routed([on_cpu(member) for member in net.members], net.route)
    loader: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(code, loader)
        noise, labels = torch.randn(count, *product.shape), product.labels(count)
        torch.manual_seed(1)
        theirs = loader["draw"](noise, labels)
        torch.manual_seed(1)
        ours = sample(product.sampler, net, noise, labels, lambda _: torch.randn_like(noise))
    return ours.clamp(-1, 1), theirs
