"""Export of students that are several networks: one pipeline each, or the experts' weights with a documented loader.

No stock pipeline switches between two UNet2DModels on the way. (For video transformers one does: WanPipeline with
`transformer`, `transformer_2` and `boundary_ratio`.) So experts by time are written as plain diffusers models beside
a table of numbers, and the loop that applies it stands in the model card; the export runs that very text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
from fewstep.config import UserError
from fewstep.export.base import PARITY, Exported, Way, aside_of, facts_of
from fewstep.export.card import model_card
from fewstep.export.fold import Folded, fold
from fewstep.export.latent import wrapped
from fewstep.export.routes import INSTEAD
from fewstep.networks.adapters import network_of
from fewstep.networks.denoiser import _TIME
from fewstep.networks.routed import ByClass, ByTime, Routed
from fewstep.recipe.store import dump
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


def way_of_routed(product: Product, way_of: Callable[[Product], Way]) -> Way:
    """How a routed student is written; `way_of` tells it of one member. UserError as `choose.way_of`."""
    net: Any = product.net
    if isinstance(net.route, ByClass):
        return _by_class(product, way_of)
    if isinstance(net.route, ByTime):
        return _by_time(product)
    raise UserError(f"export: a student routed by {type(net.route).__name__} is not written")


def _by_class(product: Product, way_of: Callable[[Product], Way]) -> Way:
    net: Any = product.net
    count = len(net.members)
    groups: list[list[int]] = [[] for _ in range(count)]
    for c in range(product.classes):
        groups[c * count // product.classes].append(c)
    ways = [
        way_of(replace(product, net=member, title=f"{product.title}, classes {group[0]}-{group[-1]}"))
        for member, group in zip(net.members, groups, strict=True)
    ]
    return Way("", partial(_write_classes, product, ways, groups))


def _write_classes(
    product: Product,
    ways: Sequence[Way],
    groups: Sequence[Sequence[int]],
    folder: Path,
    *,
    results: Sequence[tuple[str, str]] = (),
    shown: str | None = None,
) -> Exported:
    place = shown or str(folder)
    with aside_of(folder) as aside:
        aside.mkdir()
        parts = [
            way.write(aside / f"student-{k}", shown=f"{place}/student-{k}") for k, way in enumerate(ways)
        ]
        (aside / "classes.json").write_text(json.dumps({f"student-{k}": g for k, g in enumerate(groups)}))
        parity = max(p.parity for p in parts)
        facts = facts_of(product) | {
            "pipeline": "pipeline per group of classes (classes.json)",
            "parity": parity,
        }
        facts["usage"] = parts[0].usage
        (aside / "README.md").write_text(model_card(facts, dump(product.recipe), results))  # type: ignore[arg-type]
    return Exported(folder, parts[0].usage, parity)


@torch.no_grad()
def table_of(
    net: Routed, sampler: Any, prediction: str, time_input: str
) -> tuple[float, list[dict[str, Any]]]:
    """(scale of the start noise, one row per call): x' = row.x x + row.raw raw + row.noise z, all exact numbers."""
    process: Any = net.process
    times = times_of(sampler.steps, process)
    if sampler.kind == "map" and sampler.keep_noise:
        raise UserError("export: experts with noise correction are not written; sample the run itself")
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    rows = []
    for i, t in enumerate(times):
        t, last = t.expand(1), i + 1 == len(times)
        s = clean(process, t) if last else times[i + 1].expand(1)

        def moved(
            x: Tensor, raw: Tensor, z: Tensor, t: Tensor = t, s: Tensor = s, last: bool = last
        ) -> float:
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
                "time": float(_TIME[time_input](process, t)),  # type: ignore[index]
                "c_in": float(scale),
                "x": moved(one, zero, zero),
                "raw": moved(zero, one, zero),
                "noise": moved(zero, zero, one),
            }
        )
    return float(process.prior(one, times[:1])), rows


def _by_time(product: Product) -> Way:
    net: Any = product.net
    if any(wrapped(member) for member in net.members):
        first = net.members[0]
        kind = type(network_of(getattr(first, "base", first))).__name__
        raise UserError(
            f"export: no stock pipeline hands over from one {kind} to another at a noise level, and the loader that "
            f"fewstep writes for experts is for UNet2DModels; {INSTEAD}"
        )
    one = replace(product.sampler, steps=product.sampler.steps[:1])
    plain = [fold(member, one) for member in net.members]
    if any(m.takes_s for m in net.members) or plain[0].process != net.process:
        raise UserError(
            "export: experts that take a destination time or speak another process than their teacher's are not "
            "written; sample the run itself"
        )
    start, rows = table_of(net, product.sampler, plain[0].prediction, plain[0].time_input)
    return Way("", partial(_write_experts, product, plain, start, rows))


def _write_experts(
    product: Product,
    plain: Sequence[Folded],
    start: float,
    rows: list[dict[str, Any]],
    folder: Path,
    *,
    results: Sequence[tuple[str, str]] = (),
    shown: str | None = None,
) -> Exported:
    place, count = shown or str(folder), len(plain)
    shape = ", ".join(map(str, product.shape))
    labels = ", torch.tensor([0, 1, 2, 3])" if product.classes else ""
    with aside_of(folder) as aside:
        aside.mkdir()
        for k, p in enumerate(plain):
            p.unet.save_pretrained(aside / f"expert-{k}", safe_serialization=True)
        (aside / "steps.json").write_text(
            json.dumps({"experts": count, "start": start, "steps": rows}, indent=1)
        )
        parity = _parity(product, LOADER.format(folder=aside, shape=shape, labels=labels), rows)
        if not parity <= PARITY:
            raise UserError(
                f"export: the loader differs from fewstep's sampler by {parity:.2e} > {PARITY:.0e}"
            )
        usage = LOADER.format(folder=place, shape=shape, labels=labels)
        facts = facts_of(product) | {"usage": usage, "parity": parity}
        facts["pipeline"] = (
            f"set of {count} UNet2DModels, one per interval of noise levels: no stock pipeline switches between two "
            "UNets, so the loop below does"
        )
        (aside / "README.md").write_text(model_card(facts, dump(product.recipe), results))  # type: ignore[arg-type]
    return Exported(folder, usage, parity)


@torch.no_grad()
def _parity(product: Product, code: str, rows: list[dict[str, Any]], count: int = 8) -> float:
    """max |loader - fewstep| in [-1, 1], both with the same noises; runs the text of the card."""
    space: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(code, space)
        noise, labels = torch.randn(count, *product.shape), product.labels(count)
        torch.manual_seed(1)
        theirs = space["draw"](noise, labels)
        torch.manual_seed(1)
        ours = sample(
            product.sampler, product.net.cpu().float(), noise, labels, lambda _: torch.randn_like(noise)
        )
    return float((ours.clamp(-1, 1) - theirs).abs().max())
