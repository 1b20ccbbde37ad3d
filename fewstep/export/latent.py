"""Export of a student of a text or latent pipeline: its teacher's folder with the student and its schedule in place.

VAE, text encoders and tokenizers are copied as they are. The scheduler is one whose formula is the sampler's own,
at the trained levels; the reloaded folder is run and compared before anything is left behind.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.algebra.condition import checked
from fewstep.algebra.process import DiscreteVP, Flow
from fewstep.algebra.sampling import Sampler, sample
from fewstep.config import UserError
from fewstep.export.base import PARITY, Exported, Way, aside_of, facts_of
from fewstep.export.card import model_card, usage
from fewstep.export.fold import constant_inputs, moving
from fewstep.export.levels import agree, levels_of, levels_of_scheduler
from fewstep.export.routes import INSTEAD, plain_kind, route
from fewstep.export.stock import difference, fresh_noise, open_stock, run_stock, without_variance
from fewstep.networks.adapters import Adapted, on_cpu, plain_copy
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.folder import Folder, read_folder
from fewstep.networks.unet2d import UNet2D
from fewstep.networks.wrappers import Wrapper
from fewstep.recipe.store import dump
from fewstep.train.product import Product


@dataclass(frozen=True)
class Plan:
    """A scheduler, what its `set_timesteps` is given by the pipeline, and the call arguments of the pipeline."""

    scheduler: Any
    levels: dict[str, Any]
    call: dict[str, Any]

    def arguments(self) -> str:
        """The call arguments as they stand in code."""
        return ", ".join(f"{k}={v!r}" for k, v in self.call.items())


def wrapped(net: nn.Module) -> bool:
    """True for a denoiser of a diffusers class other than UNet2DModel: what this module writes."""
    whole = net.base if isinstance(net, Adapted) else net
    return any(isinstance(m, Wrapper) and not isinstance(m, UNet2D) for m in whole.modules())


def plan(net: Denoiser, sampler: Sampler) -> Plan:
    """The stock scheduler that visits the sampler's levels exactly in the wrapper's pipeline.

    Raises UserError when there is none: levels off the table, or a pipeline that takes no levels of its own.
    """
    wrapper: Any = net.net
    process: Any = net.process
    kind, n = plain_kind(sampler, process), len(sampler.steps)
    if isinstance(process, Flow) and net.prediction in ("velocity", "psi") and net.time_input == "1000t":
        if n > 1 and kind == "gamma":
            raise UserError(
                f"export: no stock flow scheduler takes steps of eta {sampler.eta}; set it to 0 or 1"
            )
        return _flow(process, wrapper, sampler, renoise=kind == "renoise" and n > 1)
    if not isinstance(process, DiscreteVP):
        raise UserError(
            f"export: {wrapper.pipeline or type(wrapper.model).__name__} has no scheduler for a student of "
            f"prediction {net.prediction!r} on {type(process).__name__}; train it in its teacher's own process"
        )
    scheduler = route(process, net.prediction, net.time_input, sampler).scheduler
    eta = {"eta": sampler.eta} if kind == "gamma" and n > 1 and wrapper.levels else {}
    wanted = levels_of(process, sampler.steps)
    counted: dict[str, Any] = {"num_inference_steps": n}
    if "original_inference_steps" in scheduler.config:
        # With the whole table as its training schedule n even steps are its own, and the config carries them.
        scheduler.register_to_config(original_inference_steps=process.steps)
    if levels_of_scheduler(scheduler, process, **counted).differ(wanted) < 1e-6:
        return Plan(scheduler, counted, counted | eta)
    if wrapper.levels != "timesteps":
        raise UserError(
            f"export: {wrapper.pipeline} takes no levels of its own, and {list(sampler.steps)} are not evenly spaced; "
            f"train at 1 - i/{n}; {INSTEAD}"
        )
    rows = {"timesteps": [round(u * process.steps) - 1 for u in sampler.steps]}
    return Plan(scheduler, rows, rows | eta)


def _flow(process: Flow, wrapper: Any, sampler: Sampler, renoise: bool) -> Plan:
    """Euler's scheduler with x0 re-noised or kept (its `stochastic_sampling`): both are exact on a flow."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    n = len(sampler.steps)
    even = all(abs(u - (1 - i / n)) < 1e-9 for i, u in enumerate(sampler.steps))
    if even and (n == 1 or wrapper.even):
        shift = float(getattr(process, "shift", 1.0))
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=renoise)
        return Plan(scheduler, {"sigmas": list(sampler.steps)}, {"num_inference_steps": n})
    times = process.grid(torch.tensor(sampler.steps, dtype=torch.float64)).tolist()
    sigmas: dict[str, Any] = {"sigmas": [float(f"{t:.9g}") for t in times]}
    # shift 1: the sigmas of the call are the trained ones, a shift would move them once more.
    return Plan(FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=renoise), sigmas, sigmas)


def student_of(product: Product) -> Denoiser:
    """The student as a plain denoiser: adapters merged, constant further inputs folded into the time embedding."""
    net = plain_copy(product.net)
    if not isinstance(net, Denoiser):
        raise UserError(
            f"export: a student inside {type(net).__name__} has no stock scheduler; train it in its teacher's own "
            f"process, not in {type(net.process).__name__} (leave out teacher.process); {INSTEAD}"
        )
    if net.inputs:
        if moving(net, product.sampler):
            raise UserError(
                f"export: this student is told where each of its {len(product.sampler.steps)} steps ends, and no stock "
                f"pipeline hands on a destination time; with one step it folds into the weights; {INSTEAD}"
            )
        constant = constant_inputs(net, net, product.sampler)
        with torch.no_grad():
            for m in net.net.embedders():  # type: ignore[union-attr,operator]
                embedding: Any = m if hasattr(m, "linear_2") else m.timestep_embedder
                embedding.linear_2.bias += constant.to(embedding.linear_2.bias)
    return net


def source_of(product: Product) -> Folder:
    """The teacher's folder, whose other parts the export takes over."""
    spec: Any = product.recipe.teacher if product.recipe else None
    if getattr(spec, "name", None) != "diffusers":
        raise UserError(
            "export: the recipe's teacher is no diffusers folder, so there is no pipeline to put it into"
        )
    folder = read_folder(spec.path)
    folder.require_components()
    if not folder.index:
        raise UserError(f"export: {spec.path} has no model_index.json; copy it from the original pipeline")
    return folder


def stock_of(product: Product) -> tuple[Folder, Any, Plan]:
    """The teacher's folder, the student's wrapper, and the stock scheduler that takes its steps in that pipeline.

    Raises UserError, with the reason, where there is none.
    """
    source, net = source_of(product), student_of(product)
    wrapper: Any = net.net
    if not wrapper.pipeline:
        raise UserError(f"export: no stock pipeline is known for {type(wrapper.model).__name__}; {INSTEAD}")
    way = plan(net, product.sampler)
    if source.index["_class_name"] == "IFPipeline":
        without_variance(way.scheduler)
    levels = levels_of(net.process, product.sampler.steps)
    agree(None, levels, levels_of_scheduler(way.scheduler, net.process, **way.levels))
    return source, wrapper, way


def call_of(wrapper: Any, way: Plan) -> str:
    """What the pipeline is called with, as it stands in code."""
    example = checked(wrapper.example(1), wrapper.needs, wrapper.takes, wrapper.pipeline)
    scale = wrapper.arguments(example, wrapper.sample_size()).get("guidance_scale", 1.0)
    what = "class_labels=[3]" if "label" in wrapper.needs else 'prompt="a red fox in the snow"'
    return f"{what}, {way.arguments()}, guidance_scale={scale}"


def way_of_latent(product: Product) -> Way:
    """How the student is written as a stock pipeline; arguments and errors as `choose.way_of`."""
    source, wrapper, way = stock_of(product)
    return Way(type(way.scheduler).__name__, partial(_write, product, source, wrapper, way))


def _write(
    product: Product,
    source: Folder,
    wrapper: Any,
    way: Plan,
    folder: Path,
    *,
    results: Sequence[tuple[str, str]] = (),
    shown: str | None = None,
) -> Exported:
    """Write the pipeline, or nothing at all.

    The parity is the largest difference of latents over their root mean square (at least 1), for random
    conditions and noise, between the reloaded folder and fewstep's sampler.
    """
    assert product.recipe is not None
    with aside_of(folder) as aside:
        aside.mkdir(parents=True)
        write(source, wrapper.model, way.scheduler, aside)
        parity = parity_of(product, wrapper, aside, way.call)
        if not parity <= PARITY:
            raise UserError(
                f"export: the pipeline differs from fewstep's sampler by {parity:.2e} > {PARITY:.0e}"
            )
        name = str(source.index["_class_name"])
        lines = usage(name, shown or str(folder), call_of(wrapper, way))
        facts = facts_of(product) | {"pipeline": name, "usage": lines, "parity": parity}
        (aside / "README.md").write_text(model_card(facts, dump(product.recipe), results))
        told = {"call": way.call, "size": list(product.shape[1:]), **again(product, way, wrapper.classes)}
        (aside / "fewstep.json").write_text(json.dumps(told))
    return Exported(folder, lines, parity)


def again(product: Product, way: Plan, classes: int) -> dict[str, Any]:
    """The sampler as `fewstep.json` tells it: its levels on the grid that the written scheduler config describes."""
    sampler, process = product.sampler, product.net.process
    steps = list(sampler.steps)
    own = float(getattr(process, "shift", 1.0))
    if isinstance(process, Flow) and float(way.scheduler.config.shift) != own:
        steps = process.grid(torch.tensor(steps, dtype=torch.float64)).tolist()
    kind = "map" if sampler.kind == "ode" else sampler.kind
    return {"kind": kind, "steps": steps, "classes": classes, "eta": sampler.eta}


def write(source: Folder, model: Any, scheduler: Any, to: Path) -> None:
    """The source's folder with another network and scheduler. Text encoders are copied, not loaded."""
    index = dict(source.index)
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None and name not in (source.component, "scheduler"):
            shutil.copytree(source.root / name, to / name)
    model.save_pretrained(to / source.component, safe_serialization=True)
    scheduler.save_pretrained(to / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (to / "model_index.json").write_text(json.dumps(index, indent=2))


@torch.no_grad()
def parity_of(
    product: Product, wrapper: Wrapper, folder: Path, call: dict[str, Any], count: int = 3
) -> float:
    """Largest difference of latents between the folder's pipeline and fewstep's sampler on the same noise."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(count, *product.shape, generator=generator)
    cond = wrapper.example(count, generator)
    theirs = run_stock(open_stock(folder), wrapper, start, cond, call)
    ours = sample(product.sampler, on_cpu(product.net), start, cond, fresh_noise(wrapper, start))
    return difference(ours, theirs)
