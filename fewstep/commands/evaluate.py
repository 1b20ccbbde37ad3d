"""`fewstep eval`: a preset on a run, a diffusers folder or a folder of images, by any number of processes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from fewstep.commands.against import pipeline_shape, source_of
from fewstep.commands.assisting import parse_assist, with_assist
from fewstep.commands.judge import Judge, captions_of, check_fit, open_judge, paired_of, preset_of, refusals, reward_of
from fewstep.commands.options import parse_steps
from fewstep.commands.processes import world
from fewstep.commands.progress import drawing, silent
from fewstep.commands.report import console, opened, say, show
from fewstep.commands.request import Request
from fewstep.commands.sources import BATCH, CLASS_METRICS, PIPELINE_BATCH, Model, of_pipeline, of_product
from fewstep.commands.transfer import add_ratios, attribute_of, marked, teachers, with_adapter
from fewstep.commands.write_images import write_images
from fewstep.config import UserError
from fewstep.eval.features.base import FeatureExtractor
from fewstep.eval.protocol.evaluation import Evaluation
from fewstep.eval.protocol.images import ImageFolder
from fewstep.eval.protocol.latency import Latency, measure_latency, seconds_per_1000
from fewstep.eval.protocol.preset import Preset, load_preset, require_files
from fewstep.eval.protocol.resize import quantise
from fewstep.eval.protocol.runner import Job, Samples, collect, extract_images, run_shards
from fewstep.eval.report import write_report
from fewstep.files import cache_dir, expanded
from fewstep.networks.adapters import placed
from fewstep.pictures import SUFFIXES, PictureError, facts
from fewstep.recipe.schema import Evaluate, default_metric
from fewstep.train.product import Product

SHOWN = 64
"""Samples of each model in the report."""


def run(request: Request) -> list[Evaluation]:
    """`fewstep eval`; returns the evaluations on the main process, nothing on the others."""
    steps, teacher = parse_steps(request.steps), parse_steps(request.teacher, "--teacher")
    product = product_of(request)
    spec = spec_of(request, product)
    shape = shape_of(request, product) if spec is not None else None
    preset = preset_for(request, spec, shape)
    if preset.reference.kind == "none":
        write_images(preset, request, steps)
        return []
    check_options(preset, request)
    with refusals():
        files = require_files(preset, weights_of(request, spec), request.clip_path, request.omit or ())
        check_source(preset, request, product, steps, teacher)
    asked = request.samples if spec is None else spec.samples
    preset, pairs = paired_of(preset, product, asked, request.omit or ())
    captions = spec.retrieval if spec is not None and product is not None else None
    recipe = None if product is None else product.recipe
    reward = None
    if product is not None:
        reward = reward_of(product) if request.attribute is None else attribute_of(product, request.attribute)
    judge = open_judge(
        preset,
        files,
        data=source_of(recipe, "data" if spec is None else spec.against, shape),
        retrieval=None if captions is None or product is None else captions_of(product, captions),
        paired=pairs,
        extractor_path=weights_of(request, spec),
        omit=request.omit or (),
    )
    judge = replace(judge, reward=reward)
    with refusals():
        if request.images is not None:
            found = [of_folder(judge, request)]
        else:
            found = of_models(judge, request, product, steps, teacher)
    if found and request.adapter is not None and request.attribute is not None:
        add_ratios(found, request.adapter, request.adapter_scale, request.attribute)
    if found:
        show(found)
    if found and request.report is not None:
        title = f"{(request.path or request.images).name} by {preset.name}"  # type: ignore[union-attr]
        page = write_report(found, request.report, title)
        console.print(f"report {page}", soft_wrap=True, highlight=False)
    return found


def product_of(request: Request) -> Product | None:
    """The product of a run; None for a diffusers folder, which is called as diffusers calls it, and for images."""
    if request.path is None or (request.path / "model_index.json").is_file():
        return None
    return opened(request.path)


def spec_of(request: Request, product: Product | None) -> Evaluate | None:
    """What the command line or a run's recipe says of the evaluation; None where a preset is named."""
    chosen = request.against is not None or request.features is not None or request.preset == "fd"
    if request.preset not in (None, "fd"):
        if chosen:
            raise UserError(f"--against, --features: preset {request.preset} has its own; give one or the other")
        return None
    own = None if product is None or product.recipe is None else product.recipe.evaluate
    changes: dict[str, Any] = {"samples": request.samples, "seed": request.seed}
    if chosen:
        changes |= {"against": request.against, "features": request.features}
        changes |= {"extractor_path": None if request.extractor_path is None else str(request.extractor_path)}
        if product is None and request.against in (None, "data"):
            raise UserError("--against: only a run knows its own data; give a folder of real pictures or FILE.npz")
        if own is None or own.metric != "fd":
            own = replace(own or Evaluate(), metric="fd")
        if request.images is not None:
            with refusals():
                changes["samples"] = request.samples or len(ImageFolder(request.images).files)
    elif own is None and product is not None and product.recipe is not None:
        own = Evaluate(metric=default_metric(product.recipe.data))
    if own is None or own.metric is None:
        what = "--images" if request.images is not None else f"{request.path}"
        raise UserError(
            f"{what}: nothing says how to measure this; give --against FOLDER with real pictures"
            + ("" if product is None else " (or --against data)")
            + ", or --preset NAME, of those that --list-presets names"
        )
    try:
        return replace(own, **{k: v for k, v in changes.items() if v is not None})
    except ValueError as error:
        raise UserError(f"--features {request.features}: {_reason(error)}") from None


def _reason(error: ValueError) -> str:
    """What a checked dataclass refuses, without pydantic's frame."""
    message = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
    return str(message).removeprefix("Value error, ")


def shape_of(request: Request, product: Product | None) -> tuple[int, ...]:
    """(C, H, W) of the samples; of ready images, that of the first."""
    if product is not None:
        return product.picture_shape()
    if request.images is None:
        assert request.path is not None
        return pipeline_shape(request.path)
    with refusals():
        grey = request.features == "house"
        return tuple(next(ImageFolder(request.images, 1 if grey else 3, grey_to_colour=not grey).images()).shape)


def weights_of(request: Request, spec: Evaluate | None) -> Path | None:
    """The weights of the feature network, by the command line or the recipe."""
    if request.extractor_path is not None or spec is None or spec.extractor_path is None:
        return request.extractor_path
    return expanded(spec.extractor_path)


def preset_for(request: Request, spec: Evaluate | None, shape: tuple[int, ...] | None) -> Preset:
    """The preset of the command line, or the recipe's."""
    if spec is not None:
        return preset_of(spec, shape)
    assert request.preset is not None
    with refusals():
        preset = load_preset(request.preset)
    return preset if request.samples is None else replace(preset, number=request.samples)


def check_options(preset: Preset, request: Request) -> None:
    """Refuse what would change nothing, or name no metric of the preset."""
    omit = request.omit or ()
    if request.out is not None:
        raise UserError(f"--out: preset {preset.name} measures; only geneval and hpsv2 write images")
    if request.allow_skips and request.images is None:
        raise UserError("--allow-skips: is for a folder of images (--images); samples are never left out")
    unknown = [m for m in omit if m not in preset.metrics]
    if unknown:
        raise UserError(f"--omit {unknown[0]}: preset {preset.name} measures {', '.join(preset.metrics)}")
    if request.clip_path is not None and ("clip-score" not in preset.metrics or "clip-score" in omit):
        raise UserError(f"--clip-path: preset {preset.name} takes no CLIP score here")


def check_source(
    preset: Preset, request: Request, product: Product | None, steps: Sequence[int], teacher: Sequence[int]
) -> None:
    """Refuse what cannot be measured before a reference is computed for it, which may take minutes."""
    if request.images is not None:
        check_images(preset, request, bool(steps or teacher))
    elif product is None:
        if teacher or request.assist is not None or request.adapter is not None or request.attribute is not None:
            option = "--teacher" if teacher else "--assist" if request.assist is not None else "--adapter, --attribute"
            raise UserError(f"{option}: {request.path} is a diffusers folder; only a run knows its teacher")
    else:
        if request.call:
            raise UserError(f"--call: {request.path} is not a diffusers folder; only a pipeline takes arguments")
        check_fit(preset, product.picture_shape(), product.classes, str(request.path))
        if teacher and (product.recipe is None or product.recipe.teacher is None):
            raise UserError(f"--teacher: {product.title} has none")


def check_images(preset: Preset, request: Request, sampled: bool) -> None:
    """What a folder of images cannot be asked for; `sampled`: an option that only sampling reads was given."""
    assert request.images is not None
    if preset.vectors:
        raise UserError(f"--images: preset {preset.name} is for vectors")
    if preset.repetitions > 1:
        raise UserError(f"--images: preset {preset.name} wants {preset.repetitions} sets of {preset.number} images")
    unread = (request.call, request.any_steps, request.assist, request.adapter, request.attribute)
    if sampled or any(unread):
        told = "--steps, --any, --teacher, --assist, --adapter, --attribute and --call"
        raise UserError(f"--images: the samples are there already, {told} change nothing")
    folder = image_folder(preset, request)
    if "clip-score" in preset.metrics and "clip-score" not in (request.omit or ()):
        check_order([f.relative_to(folder.path) for f in folder.files[: preset.number]])


def image_folder(preset: Preset, request: Request) -> ImageFolder:
    assert request.images is not None
    # A preset of null channels takes grey and colour: a grey value in all three channels is the same picture.
    either = preset.channels is None
    folder = ImageFolder(request.images, preset.channels or 3, None, request.allow_skips, grey_to_colour=either)
    if len(folder.files) < preset.number:
        size, side = size_of(folder.files[0]), preset.size
        remedy = f"measure these with --samples {len(folder.files)}"
        if side is not None and size is not None and size != (side, side):
            remedy = (
                f"it takes {side} x {side} and the first is {size[0]} x {size[1]}: --against FOLDER compares any size"
            )
        raise UserError(
            f"{request.images}: {len(folder.files)} images, but {preset.number} are asked for by preset {preset.name}; "
            f"{remedy}"
        )
    folder.number = preset.number
    return folder


def size_of(file: Path) -> tuple[int, int] | None:
    """(height, width) by the header; None where it has none, which reading it will tell."""
    try:
        return facts(file, file)[:2] if file.suffix.lower() in SUFFIXES else None
    except PictureError:
        return None


def check_order(files: Sequence[Path]) -> None:
    """UserError where names such as 10.png and 9.png sort otherwise than their numbers: image i has prompt i."""

    def numbers(file: Path) -> list[list[Any]]:
        pieces = [re.split(r"([0-9]+)", part) for part in file.parts]
        return [[int(p) if i % 2 else p for i, p in enumerate(piece)] for piece in pieces]

    for a, b in pairwise(files):
        if numbers(a) > numbers(b):
            raise UserError(
                f"--images: {a} comes before {b} by name and after it by number, so it is not known which prompt "
                "belongs to which image; pad the numbers with zeros, or give --omit clip-score"
            )


def of_folder(judge: Judge, request: Request) -> Evaluation:
    """Evaluate ready images, taken in the order of their names."""
    preset = judge.preset
    assert request.images is not None
    folder = image_folder(preset, request)
    shown: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        for batch in folder.batches(request.batch or PIPELINE_BATCH):
            check_fit(preset, batch.shape[1:], None, str(request.images))
            shown.append(batch[: max(0, SHOWN - sum(map(len, shown)))])
            yield batch

    samples = extract_images(batches(), judge.extractor, preset.steps, judge.clip_images, preset.clip_steps)
    lacks = dict.fromkeys(CLASS_METRICS, "a folder of images does not say which class was asked for")
    if folder.skipped:
        lacks["clip-score"] = "images were skipped, so it is not known which prompt belongs to which"
    name = request.images.name
    model = Model(
        name=name,
        group=name,
        steps=None,
        calls=None,
        digest=lambda: name,
        generate=lambda _: _none,
        lacks=lacks,
    )
    return judge.evaluate(model, samples, skipped=folder.skipped, images=torch.cat(shown))


def _none(indices: list[int]) -> Tensor:
    raise NotImplementedError("images of a folder are read, not generated")


def models(
    judge: Judge,
    request: Request,
    product: Product | None,
    steps: Sequence[int],
    teacher: Sequence[int],
    device: torch.device,
) -> list[Model]:
    """A run at its steps (and its teacher's), or a pipeline as diffusers itself calls it."""
    path, preset = request.path, judge.preset
    assert path is not None
    if product is None:
        return of_pipeline(
            preset,
            path,
            steps=steps,
            call=request.call or (),
            prompts=judge.prompts,
            device=device,
            check=lambda shape: check_fit(preset, shape, None, str(path)),
            any_steps=request.any_steps,
        )
    placed(product.net, device)
    counts = steps or (product.fitted.counts if product.fitted is not None else ())
    found = [product.with_steps(n, request.any_steps) for n in counts] or [product]
    out = [of_product(preset, p, path.name) for p in found]
    if request.assist is not None:
        part = parse_assist(request.assist)
        helped = [with_assist(p, part) for p in found]
        out += [of_product(preset, h, path.name, f"{m.name} + {part.name}") for h, m in zip(helped, out, strict=True)]
    file, scale = request.adapter, request.adapter_scale
    if file is not None:
        plain = list(zip(found, out, strict=False))
        out += [
            of_product(preset, with_adapter(p, file, scale), path.name, marked(m.name, file, scale)) for p, m in plain
        ]
    return out + teachers(preset, product, teacher, device, file, scale) if teacher else out


def of_models(
    judge: Judge, request: Request, product: Product | None, steps: Sequence[int], teacher: Sequence[int]
) -> list[Evaluation]:
    """Generate and evaluate at every number of steps; empty on all but the main process."""
    extractor, clip = judge.extractor, judge.clip_images
    batch = request.batch or (PIPELINE_BATCH if product is None else BATCH)
    found = []
    with world() as (place, barrier):
        for network in (extractor, clip):
            if place.device.type != "cpu" and isinstance(network, torch.nn.Module):
                network.to(place.device)
        for model in models(judge, request, product, steps, teacher, place.device):
            digest = model.digest()
            jobs = [judge.job(batch, {"model": digest, "repetition": r}) for r in range(judge.preset.repetitions)]
            for number, job in enumerate(jobs):
                make, folder = model.generate(number), shards_of(job, extractor, clip)
                share: Any = {"rank": place.rank, "world_size": place.size}
                own = sum(map(len, job.shards[place.rank :: place.size]))
                title = model.name + (f", {number + 1} of {len(jobs)}" if len(jobs) > 1 else "")
                with drawing(title, own, say if place.main else silent, console if place.main else None) as told:
                    run_shards(job, folder, make, extractor, progress=told, clip=clip, **share)
            barrier()
            if not place.main:
                continue
            sets = [collect(job, shards_of(job, extractor, clip), extractor, clip) for job in jobs]
            found.append(of_samples(judge, model, sets, batch, request.report is not None))
            for samples in sets:
                discard(samples)
        barrier()
    return found


def of_samples(judge: Judge, model: Model, sets: list[Samples], batch: int, report: bool) -> Evaluation:
    """The evaluation of one model; for a report with its first images and its latency."""
    preset = judge.preset
    latency: list[Latency] = []
    images = None
    if report:
        make = model.generate(0)

        def generate(indices: list[int]) -> Tensor:
            # A small set has fewer conditions than the clock asks for.
            return make([i % preset.number for i in indices])

        first = torch.arange(min(SHOWN, preset.number)).split(batch)
        with torch.no_grad():
            if not preset.vectors:
                images = torch.cat([generate(part.tolist()).cpu() for part in first])
                images = quantise(images, preset.quantiser).round().to(torch.uint8)
            for size in sorted({1, batch}):
                latency.append(measure_latency(generate, size, repeats=5, warm_up=1))
    seconds = seconds_per_1000(model.generate(0), list(range(min(batch, preset.number))))
    return judge.evaluate(model, sets, seconds=seconds, images=images, latency=tuple(latency))


def shards_of(job: Job, extractor: FeatureExtractor, clip: FeatureExtractor | None) -> Path:
    return cache_dir("evaluation") / job.key(extractor, clip)[:24]


def discard(samples: Samples) -> None:
    """Remove the shards of a finished evaluation from the cache."""
    # A killed attempt may have left temporary files; a folder that stays must not cost the result.
    shutil.rmtree(samples.shards[0].parent, ignore_errors=True)
