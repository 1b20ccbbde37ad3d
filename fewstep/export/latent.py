"""Export of a student of a text or latent pipeline: its teacher's folder with the student and its schedule in place.

VAE, text encoders and tokenizers are copied as they are. The scheduler is one whose formula is the sampler's own,
at the trained levels; the reloaded folder is run and compared before anything is left behind.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.process import DiscreteVP, Flow
from fewstep.algebra.sampling import Sampler, sample
from fewstep.export.base import ExportRefused, Parts, Stock
from fewstep.export.call import pipeline_name, settings_of, what_of
from fewstep.export.card import Card, front_of, student_card, usage
from fewstep.export.flow_map import CLASSES, LOOP, SCHEDULER, flow_map_model, flow_map_stock, known_row, retold
from fewstep.export.fold import constant_inputs, moving
from fewstep.export.image_to_image import PIPELINES, begun, draw_from, image_to_image_stock, image_usage, run_from, taken
from fewstep.export.levels import TOLERANCE, check_export, is_even, levels_of, levels_of_scheduler
from fewstep.export.picture import (
    IF_PIPELINES,
    NOISING,
    check_picture,
    controlnet_usage,
    picture_usage,
    save_noising,
    whole_model,
)
from fewstep.export.routes import INSTEAD, check_history, plain_kind, scm_stock, unet_stock
from fewstep.export.stock import fresh_noise, open_stock, run_stock, without_variance
from fewstep.networks.adapters import Adapted, on_cpu, plain_copy
from fewstep.networks.controlnet import CONTROLNET_PIPELINES, Controlled
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.diffusers import DTYPES
from fewstep.networks.folder import Folder, part_of, read_folder
from fewstep.networks.scheduler import own_steps
from fewstep.networks.unet2d import UNet2D
from fewstep.networks.weights import not_finite
from fewstep.networks.wrappers import Wrapper
from fewstep.train.note import NAME, Note
from fewstep.train.product import Product


def wrapped(net: nn.Module) -> bool:
    """True for a denoiser of a diffusers class other than UNet2DModel: what this module writes."""
    whole = net.base if isinstance(net, Adapted) else net
    return any(isinstance(m, Wrapper) and not isinstance(m, UNet2D) for m in whole.modules())


def latent_stock(net: Denoiser, sampler: Sampler) -> Stock:
    """The stock scheduler that visits the sampler's levels exactly in the wrapper's pipeline.

    Raises ExportRefused when there is none: levels off the table, or a pipeline that takes no levels of its own.
    """
    wrapper: Any = net.net
    process: Any = net.process
    kind, n = plain_kind(sampler, process), len(sampler.steps)
    check_history(process, sampler)
    if moving(net, sampler):
        return flow_map_stock(process, sampler)
    if isinstance(process, Flow) and net.prediction in ("velocity", "psi") and net.time_input == "1000t":
        return _flow(process, wrapper, sampler, renoise=kind == "renoise" and n > 1)
    if isinstance(process, Flow) and wrapper.pipeline == "SanaSprintPipeline":
        return scm_stock(process, sampler, kind)
    if not isinstance(process, DiscreteVP):
        raise ExportRefused(
            f"{wrapper.pipeline or type(wrapper.model).__name__} has no scheduler for a student of "
            f"prediction {net.prediction!r} on {type(process).__name__}; train it in its teacher's own process"
        )
    stock = unet_stock(net, sampler)
    eta = {"eta": sampler.eta} if kind == "gamma" and n > 1 and wrapper.levels else {}
    counted: dict[str, Any] = {"num_inference_steps": n}
    config = stock.config
    if stock.name in ("LCMScheduler", "TCDScheduler"):
        # With the whole table as its training schedule n even steps are its own, and the config carries them.
        config = config | {"original_inference_steps": process.steps}
    even = Stock(stock.name, config, counted | eta, _written(sampler), levels=counted)
    if levels_of_scheduler(even.scheduler, **counted).differ(levels_of(process, sampler.steps)) < TOLERANCE:
        return even
    if wrapper.levels != "timesteps":
        raise ExportRefused(
            f"{wrapper.pipeline} takes no levels of its own, and {list(sampler.steps)} are not evenly spaced; "
            f"train at 1 - i/{n}; {INSTEAD}"
        )
    rows = {"timesteps": [round(u * process.steps) - 1 for u in sampler.steps]}
    return Stock(stock.name, config, rows | eta, _written(sampler), levels=rows)


def _flow(process: Flow, wrapper: Any, sampler: Sampler, renoise: bool) -> Stock:
    """Euler's scheduler with x0 re-noised or kept (its `stochastic_sampling`): both are exact on a flow."""
    n, name = len(sampler.steps), "FlowMatchEulerDiscreteScheduler"
    own = float(getattr(process, "shift", 1.0))
    even = is_even(sampler.steps)
    if even and (n == 1 or wrapper.even):
        sigmas = {"sigmas": list(sampler.steps)}
        config = {"shift": own, "stochastic_sampling": renoise}
        return Stock(name, config, {"num_inference_steps": n}, _written(sampler), levels=sigmas)
    times = tuple(process.grid(torch.tensor(sampler.steps, dtype=torch.float64)).tolist())
    if even:
        inner, low = own_steps(own, n)
        config = {"shift": inner, "shift_terminal": low, "stochastic_sampling": renoise}
        written = _written(sampler, tuple(t / (inner - (inner - 1) * t) for t in times))
        return Stock(name, config, {"num_inference_steps": n}, written)
    # shift 1: the sigmas of the call are the trained ones, a shift would move them once more.
    config = {"shift": 1.0, "stochastic_sampling": renoise}
    written = _written(sampler, None if own == 1.0 else times)
    return Stock(name, config, {"sigmas": [float(f"{t:.9g}") for t in times]}, written)


def _written(sampler: Sampler, steps: tuple[float, ...] | None = None) -> Sampler:
    """The sampler by its levels on the written scheduler's grid, where these are others."""
    kind = "map" if sampler.kind == "ode" else sampler.kind
    return Sampler(kind=kind, steps=steps or sampler.steps, eta=sampler.eta, history=sampler.history)


def student_of(product: Product, maps: bool = False) -> Denoiser:
    """The student as a plain denoiser: adapters merged, constant further inputs folded into the time embedding.

    maps: leave the inputs of a flow map of several steps as they are, where a stock class hands on a destination time.
    """
    net = plain_copy(product.net)
    if not isinstance(net, Denoiser):
        raise ExportRefused(
            f"a student inside {type(net).__name__} has no stock scheduler; train it in its teacher's own "
            f"process, not in {type(net.process).__name__} (leave out teacher.process); {INSTEAD}"
        )
    if net.inputs:
        if moving(net, product.sampler):
            if maps and getattr(net.net, "pipeline", "") in CLASSES:
                return net
            raise ExportRefused(
                f"this student is told where each of its {len(product.sampler.steps)} steps ends, and no stock pipeline "
                f"of its class hands on a destination time; with one step it folds into the weights; {LOOP}"
            )
        constant = constant_inputs(net, net, product.sampler)
        with torch.no_grad():
            for m in net.net.embedders():  # type: ignore[operator]
                embedding: Any = m if hasattr(m, "linear_2") else getattr(m, "timestep_embedder", m)
                last = embedding.linear_2 if hasattr(embedding, "linear_2") else _last_linear(m)
                last.bias += constant.to(last.bias)
    return net


def _last_linear(module: nn.Module) -> Any:
    return [m for m in module.modules() if isinstance(m, nn.Linear)][-1]


def source_of(product: Product) -> Folder:
    """The teacher's folder, whose other parts the export takes over."""
    spec: Any = product.recipe.teacher if product.recipe else None
    fitted = product.fitted is not None and product.fitted.of == "folder"
    if not fitted and getattr(spec, "name", None) != "diffusers":
        raise ExportRefused("the recipe's teacher is no diffusers folder, so there is no pipeline to put it into")
    folder = read_folder(product.fitted.source if product.fitted is not None and fitted else spec.folder)
    folder.require_agreement()
    folder.require_components()
    if not folder.index:
        raise ExportRefused(f"{folder.shown} has no model_index.json; copy it from the original pipeline")
    return folder


def stock_of(product: Product, begins: bool = False, maps: bool = False) -> tuple[Folder, Any, Stock]:
    """The teacher's folder, the student's wrapper, and the stock scheduler that takes its steps in that pipeline.

    begins: with a picture, noised to its first level. maps: as in `student_of`; the pipeline is then another than the
    teacher's (`flow_map.CLASSES`). Raises ExportRefused, with the reason, where there is none, UserError for a folder
    that misses something.
    """
    source, net = source_of(product), student_of(product, maps)
    wrapper: Any = net.net
    if not wrapper.pipeline:
        raise ExportRefused(f"no stock pipeline is known for {type(wrapper.model).__name__}; {INSTEAD}")
    if begins:
        stock = image_to_image_stock(net, product.sampler, pipeline_name(source, wrapper))
    else:
        stock = latent_stock(net, product.sampler)
        check_picture(wrapper, stock)
    if pipeline_name(source, wrapper) in IF_PIPELINES:
        without_variance(stock.scheduler)
    check_export(net.process, product.sampler.steps, stock)
    return source, wrapper, stock


def is_video(product: Product) -> bool:
    """Samples (c, f, h, w)."""
    return len(product.shape) == 4


def guided(product: Product, wrapper: Any) -> list[tuple[str, str]]:
    """The guidance in a student's weights, as its recipe counts it and as its teacher's pipeline does: for its card.

    None where that pipeline's only scale is an input of the network, which is another thing.
    """
    scale = getattr(product.recipe.method, "guidance", None) if product.recipe is not None else None
    if not isinstance(scale, int | float) or scale == 1 or "label" in wrapper.needs or not wrapper.cfg:
        return []
    theirs = scale - wrapper.scale_of_pipeline(0.0)  # which counts from 1 or from 0
    told = f"{scale:g} where 1 is none; of the teacher's pipeline {wrapper.cfg}={theirs:g}"
    return [("guidance in its weights", told)]


def latent_parts(
    product: Product,
    dtype: str = "fp32",
    card: Card | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    variant: bool = False,
    level: float | None = None,
) -> Parts:
    """The student in its teacher's pipeline, its weights written in a dtype of DTYPES; errors as `choose.parts_of`.

    card: another than a student's. settings: of the pipeline's call, in place of its own. variant: files of weights are
    named after the dtype. level: in the image-to-image pipeline, which begins with a picture noised to
    this trained level.

    Latents are compared, for random conditions and noise, relative to their root mean square where that is above 1.
    """
    if dtype != "fp32":
        net = student_of(product, maps=True)
        if moving(net, product.sampler):
            raise ExportRefused(f"--dtype {dtype}: a student that is told where its steps end is written in float32")
        product = replace(product, net=_rounded(net, DTYPES[dtype]))
    begins = level is not None
    if level is not None:
        product = begun(product, level)
    source, wrapper, stock = stock_of(product, begins, maps=not begins)
    process: Any = product.net.process
    levels = levels_of(process, product.sampler.steps).shares()
    name, written = pipeline_name(source, wrapper, begins), stock.sampler
    made: Callable[[], nn.Module] = partial(whole_model, wrapper)
    told = guided(product, wrapper)
    if stock.name == SCHEDULER:
        if name not in CLASSES:
            raise ExportRefused(f"no pipeline like {name} hands on a destination time; {LOOP}")
        name, net = CLASSES[name][0], student_of(product, maps=True)
        made = partial(flow_map_model, net, product.sampler)
        told = [*told, known_row(net, product.sampler, wrapper.width // 2)]
    known = settings_of(product, source, wrapper) | dict(settings or {})
    if begins:
        known = taken(name, known)
    front = front_of(source, is_video(product), "text" in wrapper.needs, begins or bool(wrapper.image_channels))
    note = Note(
        classes=wrapper.classes,
        size=tuple(product.shape[1:]),
        sampler=written,
        levels=levels,
        call=stock.call,
        settings=known,
    )

    named: dict[str, Any] = {"variant": dtype} if variant else {}

    def pairs(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
        yield _both(product, wrapper, folder, stock.call, **named)

    return Parts(
        scheduler=stock.name,
        save=partial(_save, source, wrapper, made, name, stock.scheduler, DTYPES[dtype], **named),
        pairs=pairs,
        usage=usage_of(product, name, wrapper, {**what_of(product, source, wrapper), **stock.call, **known}, **named),
        card=partial(card or partial(student_card, front=front, told=told), product, name),
        note=(NAME, note.text()),
    )


def _rounded(net: Denoiser, dtype: torch.dtype) -> Denoiser:
    """The student with all that is saved as a dtype has it, in float32. Raises ExportRefused for what it cannot hold."""
    saved = dict(net.state_dict())
    for m in net.modules():
        if hasattr(m, "with_own_base"):
            m.with_own_base()  # type: ignore[operator]
            saved |= m.model.state_dict()  # type: ignore[union-attr]
    saved = {k: v for k, v in saved.items() if v.is_floating_point()}
    for v in saved.values():
        v.copy_(v.to(dtype))
    bad = not_finite(saved.items())
    if bad:
        raise ExportRefused(f"{dtype} cannot hold {bad}; write bf16, or float32 without --dtype")
    return net


LACKS = "# This folder has no text encoder: yours go there."


def usage_of(product: Product, name: str, wrapper: Any, call: Mapping[str, Any], **named: str) -> Callable[[str], str]:
    """The lines that run an export, given its folder; named: see `card.usage`."""
    if name in PIPELINES.values():
        _, high, wide = product.shape
        shape = product.shape if name == "IFImg2ImgPipeline" else (3, high * wrapper.pixels, wide * wrapper.pixels)
        return partial(image_usage, name, call, shape, **named)
    if not wrapper.image_channels:
        if "prompt_embeds" in call:
            named["then"] = "\n".join(filter(None, (named.get("then"), LACKS)))
        return partial(usage, name, call, **named)
    sides = (n * wrapper.pixels for n in product.shape[1:])
    size = tuple(image_of(product) or (wrapper.image_channels, *sides))
    if name in CONTROLNET_PIPELINES:
        return partial(controlnet_usage, name, call, size, **named)
    return partial(picture_usage, call, size, int(wrapper.config.encoder_hid_dim), **named)


def image_of(product: Product) -> tuple[int, ...] | None:
    """(c', h', w') of the pictures that a product is made from, by its data; None where they do not say."""
    data: Any = getattr(product.recipe, "data", None)
    return data.image_outline() if hasattr(data, "image_outline") else None


def _save(
    source: Folder,
    wrapper: Any,
    made: Callable[[], nn.Module],
    pipeline: str,
    scheduler: Any,
    dtype: torch.dtype,
    to: Path,
    *,
    variant: str | None = None,
) -> None:
    """The source's folder with another network and scheduler, of the class `pipeline`. Text encoders are copied."""
    model: Any = made()
    index = dict(source.index) | {"_class_name": pipeline}
    if type(scheduler).__name__ == SCHEDULER:
        index = retold(index, source.component)
    for name, entry in index.items():
        if part_of(entry) and name not in (source.component, "scheduler"):
            shutil.copytree(source.root / name, to / name)
    if model is wrapper.model and (dtype is not torch.float32 or pipeline in CONTROLNET_PIPELINES):
        model = copy.deepcopy(model)  # the sampler's own network stays as it is, and the one that a ControlNet is beside
    model = model.to(dtype)
    model.save_pretrained(to / source.component, safe_serialization=True, variant=variant)
    scheduler.save_pretrained(to / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    if wrapper.pipeline in CONTROLNET_PIPELINES:
        net = wrapper.controlnet if dtype is torch.float32 else copy.deepcopy(wrapper.controlnet).to(dtype)
        net.save_pretrained(to / "controlnet", safe_serialization=True, variant=variant)
        index["controlnet"] = ["diffusers", "ControlNetModel"]
    elif wrapper.image_channels:
        shutil.rmtree(to / NOISING, ignore_errors=True)
        save_noising(to, index)
    (to / "model_index.json").write_text(json.dumps(index, indent=2))


@torch.no_grad()
def _both(
    product: Product, wrapper: Wrapper, folder: Path, call: dict[str, Any], count: int = 3, **opened: str
) -> tuple[Tensor, Tensor]:
    """(fewstep's, the folder's pipeline's) latents (count, c, h, w) from the same noise and conditions."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(count, *product.shape, generator=generator)
    cond = wrapper.example(count, generator)
    if isinstance(wrapper, Controlled):  # whose example is of the size that the UNet was made for
        cond |= wrapper.picture_at(product.shape[1:], count, generator)
    pipe = open_stock(folder, **opened)
    if "strength" in call:
        return draw_from(on_cpu(product.net), product.sampler, wrapper, start, cond), run_from(
            pipe, wrapper, start, cond, call
        )
    theirs = run_stock(pipe, wrapper, start, cond, call)
    return sample(product.sampler, on_cpu(product.net), start, cond, fresh_noise(wrapper, start)), theirs
