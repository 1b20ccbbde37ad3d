"""`fewstep eval --preset`: a protocol on a run, a diffusers folder or a folder of images, by any number of processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor

from fewstep.config import UserError, plain
from fewstep.eval.cache import cache_dir, file_sha256
from fewstep.eval.evaluate import Evaluation, evaluate, format_entry, preset_reference
from fewstep.eval.features import FeatureExtractor, state_sha256
from fewstep.eval.images import ImageFolder
from fewstep.eval.latency import Latency, measure_latency
from fewstep.eval.networks import build_extractor
from fewstep.eval.pipelines import count_calls, pipeline_generate
from fewstep.eval.prompts import export_images, places, read_prompts
from fewstep.eval.protocol import Preset, labels_of, load_preset, require_files
from fewstep.eval.reference import Reference
from fewstep.eval.report import Entry, write_report
from fewstep.eval.resize import Step, quantise
from fewstep.eval.runner import Job, Samples, collect, extract_images, run_shards
from fewstep.measure import teacher_product
from fewstep.product import Product, open_product

console = Console()
SHOWN = 64
"""Samples of each model in the report."""

Generate = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Request:
    """What is asked for on the command line; see `fewstep eval --help`."""

    preset: str
    path: Path | None = None
    images: Path | None = None
    steps: tuple[int, ...] = ()
    any_steps: bool = False
    teacher: tuple[int, ...] = ()
    samples: int | None = None
    batch: int = 64
    call: tuple[str, ...] = ()
    extractor_path: Path | None = None
    allow_skips: bool = False
    report: Path | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Model:
    """Something to evaluate: `generate(repetition)` gives the seam of `fewstep.eval.runner`.

    `digest` identifies weights and settings; `calls` are network calls per image.
    """

    name: str
    group: str
    steps: int
    calls: int
    digest: str
    generate: Callable[[int], Generate]


@dataclass(frozen=True)
class World:
    """This process among those that were launched together."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


@contextmanager
def world() -> Iterator[tuple[World, Callable[[], None]]]:
    """The processes started by accelerate or torch.distributed.run, and a barrier; closed at the end."""
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        yield World(state.process_index, state.num_processes, state.device), state.wait_for_everyone
    finally:
        if state.num_processes > 1:
            torch.distributed.destroy_process_group()


@contextmanager
def told() -> Iterator[None]:
    """What the harness refuses is the user's to mend: one message instead of a traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError, PermissionError, ModuleNotFoundError, ArithmeticError) as error:
        raise UserError(str(error)) from None


def run(request: Request) -> list[Evaluation]:
    """`fewstep eval --preset`; returns the evaluations on the main process, nothing on the others."""
    with told():
        preset = load_preset(request.preset)
        if request.samples is not None:
            preset = replace(preset, number=request.samples)
        if (request.path is None) == (request.images is None):
            raise UserError(
                "eval: give either a run or diffusers folder to sample, or --images FOLDER with samples"
            )
        if preset.reference.kind == "none":
            export(preset, request)
            return []
        files = require_files(preset, request.extractor_path)
        check_source(preset, request)
        extractor = build_extractor(preset.extractor, files.get("weights", request.extractor_path))
        reference = preset_reference(preset, extractor)
        if request.images is not None:
            found = [entry_of_folder(preset, request, extractor, reference)]
        else:
            found = entries_of_models(preset, request, extractor, reference, files.get("prompts"))
        if found:
            show([entry.evaluation for entry in found])
        if found and request.report is not None:
            title = f"{(request.path or request.images).name} by {preset.name}"  # type: ignore[union-attr]
            page = write_report(found, request.report, title)
            console.print(f"report {page}", soft_wrap=True, highlight=False)
        return [entry.evaluation for entry in found]


def check_source(preset: Preset, request: Request) -> None:
    """Refuse what cannot be measured before a reference is computed for it, which may take minutes."""
    if request.images is not None:
        if preset.repetitions > 1:
            raise UserError(
                f"--images: preset {preset.name} wants {preset.repetitions} sets of {preset.number} images"
            )
        if request.steps or request.teacher or request.call:
            raise UserError(
                "--images: the samples are there already, --steps, --teacher and --call change nothing"
            )
        ImageFolder(request.images, preset.channels, preset.number, request.allow_skips)
    elif request.path is not None and not (request.path / "model_index.json").is_file():
        check_size(preset, open_product(request.path).shape, str(request.path))


def entry_of_folder(
    preset: Preset, request: Request, extractor: FeatureExtractor, reference: Reference
) -> Entry:
    """Evaluate ready images, taken in the order of their names."""
    assert request.images is not None
    folder = ImageFolder(request.images, preset.channels, preset.number, request.allow_skips)
    shown: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        for batch in folder.batches(request.batch):
            check_size(preset, tuple(batch.shape[1:]), str(request.images))
            shown.append(batch[: max(0, SHOWN - sum(map(len, shown)))])
            yield batch

    samples = extract_images(batches(), extractor, chain(preset))
    reason = "a folder of images does not say which class was asked for"
    omit = dict.fromkeys(("class-accuracy", "diversity"), reason)
    result = evaluate(
        request.images.name, preset, extractor, samples, reference, skipped=folder.skipped, omit=omit
    )
    return Entry(result, 1, images=torch.cat(shown))


def entries_of_models(
    preset: Preset,
    request: Request,
    extractor: FeatureExtractor,
    reference: Reference,
    prompts_file: Path | None,
) -> list[Entry]:
    """Generate and evaluate at every number of steps; empty on all but the main process."""
    assert request.path is not None
    prompts = read_prompts(prompts_file, preset.number) if prompts_file else None
    entries = []
    with world() as (place, barrier):
        if place.device.type != "cpu" and isinstance(extractor, torch.nn.Module):
            extractor.to(place.device)
        for model in models(preset, request, prompts, place):
            jobs = [job_of(preset, model, r, request.batch) for r in range(preset.repetitions)]
            for number, job in enumerate(jobs):
                folder = shards_of(job, extractor)
                run_shards(
                    job, folder, model.generate(number), extractor, rank=place.rank, world_size=place.size
                )
            barrier()
            if not place.main:
                continue
            sets = [collect(job, shards_of(job, extractor), extractor) for job in jobs]
            entries.append(entry_of_samples(preset, request, model, extractor, reference, sets))
            for samples in sets:
                discard(samples)
        barrier()
    return entries


def entry_of_samples(
    preset: Preset,
    request: Request,
    model: Model,
    extractor: FeatureExtractor,
    reference: Reference,
    sets: list[Samples],
) -> Entry:
    latency: list[Latency] = []
    images = None
    if request.report is not None:
        generate = model.generate(0)
        with torch.no_grad():
            images = quantise(generate(list(range(min(SHOWN, preset.number)))).cpu(), preset.quantiser)
            images = images.round().to(torch.uint8)
            for batch in sorted({1, request.batch}):
                latency.append(measure_latency(generate, batch, repeats=5, warm_up=1))
    seconds = 1000 / latency[-1].images_per_second if latency else None
    result = evaluate(model.name, preset, extractor, sets, reference, seconds=seconds, calls=model.calls)
    return Entry(result, model.calls, model.group, images, tuple(latency))


def job_of(preset: Preset, model: Model, repetition: int, batch: int) -> Job:
    identity = {"preset": preset.hash, "model": model.digest, "repetition": repetition}
    # Small enough that several processes share a small set, and the same for any number of them.
    shard = max(1, min(500, -(-preset.number // 8)))
    return Job(preset.number, identity, shard, batch, preset.quantiser, chain(preset))


def shards_of(job: Job, extractor: FeatureExtractor) -> Path:
    return cache_dir("evaluation") / job.key(extractor)[:24]


def discard(samples: Samples) -> None:
    """Remove the shards of a finished evaluation from the cache."""
    folder = samples.shards[0].parent
    for file in [*folder.glob("shard-*"), folder / "job.json"]:
        file.unlink(missing_ok=True)
    folder.rmdir()


def chain(preset: Preset) -> list[Step]:
    return [Step(step.op, step.size) for step in preset.chain]


def check_size(preset: Preset, shape: Sequence[int], what: str) -> None:
    wanted = (preset.channels, preset.size, preset.size)
    if tuple(shape) != wanted:
        raise UserError(f"{what}: images are {list(shape)}, preset {preset.name} is for {list(wanted)}")


def models(preset: Preset, request: Request, prompts: Sequence[str] | None, place: World) -> list[Model]:
    """A run at its steps (and its teacher's), or a diffusers pipeline as diffusers itself calls it."""
    assert request.path is not None
    if (request.path / "model_index.json").is_file():
        if request.teacher:
            raise UserError(f"--teacher: {request.path} is a diffusers folder; only a run knows its teacher")
        return pipelines(preset, request, prompts, place)
    if request.call:
        raise UserError(f"--call: {request.path} is not a diffusers folder; only a pipeline takes arguments")
    product = open_product(request.path)
    check_size(preset, product.shape, str(request.path))
    if prompts is not None or product.classes != (preset.conditions.classes or 0):
        wanted = "prompts" if prompts is not None else f"{preset.conditions.classes or 0} classes"
        raise UserError(
            f"{request.path}: was trained with {product.classes} classes, preset {preset.name} asks for {wanted}"
        )
    product.net.to(place.device)
    found = [product.with_steps(n, request.any_steps) for n in request.steps] or [product]
    out = [of_product(preset, p, request.path.name) for p in found]
    if request.teacher:
        out += [of_product(preset, p, "teacher") for p in teachers(product, request.teacher, place)]
    return out


def teachers(product: Product, steps: Sequence[int], place: World) -> list[Product]:
    """The teacher of a run at several numbers of Heun steps."""
    from fewstep.train.build import build_roles

    recipe = product.recipe
    assert recipe is not None
    if recipe.teacher is None:
        raise UserError(f"--teacher: {product.title} has none")
    teacher = build_roles(recipe, recipe.data.open()).teacher.to(place.device)  # type: ignore[attr-defined]
    return [teacher_product(product, teacher, n) for n in steps]


def of_product(preset: Preset, product: Product, group: str) -> Model:
    steps = len(product.sampler.steps)
    device = next((p.device for p in product.net.parameters()), torch.device("cpu"))

    def generate(repetition: int) -> Generate:
        first = preset.seeds(repetition).start

        def images(indices: list[int]) -> Tensor:
            index = torch.tensor([first + i for i in indices], device=device)
            labels = None
            if product.classes:
                labels = torch.tensor(labels_of(preset, indices), device=device)
            return product.images(index, labels)

        return images

    content = json.dumps([state_sha256(product.net), plain(product.sampler)])
    digest = hashlib.sha256(content.encode()).hexdigest()
    name = f"{group}, {steps} step{'s' * (steps > 1)}"
    return Model(name, group, steps, product.sampler.network_calls(), digest, generate)


def arguments(pieces: Sequence[str]) -> dict[str, Any]:
    """key=value pieces with YAML values; UserError names a bad one."""
    out = {}
    for piece in pieces:
        key, equals, value = piece.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--call {piece!r}: expected key=value, such as guidance_scale=1.0")
        try:
            out[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--call {piece!r}: {value!r} is not a YAML value") from None
    return out


def load_pipeline(path: Path, device: torch.device) -> Any:
    """The folder's own pipeline class, from the folder alone."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise UserError(f"{path}: diffusers cannot open it: {error}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def pipelines(preset: Preset, request: Request, prompts: Sequence[str] | None, place: World) -> list[Model]:
    """A diffusers folder at every number of steps asked for; an export knows its own."""
    path = request.path
    assert path is not None
    note = path / "fewstep.json"
    known = json.loads(note.read_text()).get("steps") if note.is_file() else None
    steps = request.steps or ((len(known),) if known else ())
    if not steps:
        raise UserError(f"{path}: does not say how many steps it takes; give --steps")
    pipeline = load_pipeline(path, place.device)
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    given = arguments(request.call)
    content = [[str(p.relative_to(path)), file_sha256(p)] for p in files]
    out = []
    for n in steps:

        def generate(repetition: int, n: int = n) -> Generate:
            return pipeline_generate(
                pipeline,
                seed=preset.seeds(repetition).start,
                labels=(lambda i: labels_of(preset, i)) if preset.conditions.classes else None,
                prompts=prompts,
                num_inference_steps=n,
                **given,
            )

        try:
            calls = count_calls(network, generate(0), [0]) if network is not None else n
            image = generate(0)([0])
        except (TypeError, KeyError) as error:
            raise UserError(f"{path}: its pipeline cannot be called like that: {error}") from None
        check_size(preset, tuple(image.shape[1:]), str(path))
        digest = hashlib.sha256(json.dumps([content, n, given], default=str).encode()).hexdigest()
        name = f"{path.name}, {n} step{'s' * (n > 1)}"
        out.append(Model(name, path.name, n, calls, digest, generate))
    return out


def export(preset: Preset, request: Request) -> None:
    """Write the folder that another package's evaluator reads."""
    if request.path is None or not (request.path / "model_index.json").is_file():
        raise UserError(f"preset {preset.name}: writes images of a diffusers folder; give the path of one")
    if request.out is None:
        raise UserError(f"preset {preset.name}: only writes images; say where with --out FOLDER")
    if request.report is not None:
        raise UserError(
            f"--report: preset {preset.name} measures nothing, it writes images for another package"
        )
    file = require_files(preset)["prompts"]
    per = preset.images_per_prompt
    prompts = [p for p in read_prompts(file, -(-preset.number // per)) for _ in range(per)]
    places(preset, request.out)
    with world() as (place, barrier):
        if len(request.steps) > 1:
            raise UserError(f"--steps: preset {preset.name} writes one set of images; give one number")
        model = models(preset, request, prompts, place)[0]
        made = export_images(
            preset,
            file,
            request.out,
            model.generate(0),
            batch_size=request.batch,
            rank=place.rank,
            world_size=place.size,
        )
        barrier()
        if place.main:
            console.print(f"{request.out}: {preset.number} images there, {made} made now by this process")


def show(evaluations: Sequence[Evaluation]) -> None:
    """Print every metric of every model."""
    for e in evaluations:
        calls = "" if e.calls is None else f", {e.calls} network call{'s' * (e.calls != 1)} each"
        lines = [f"{e.name}: {e.preset} ({e.preset_hash}), {e.number} images{calls}"]
        lines += [f"  {name}: {format_entry(entry)}" for name, entry in e.metrics.items()]
        lines += [f"  left out: {name}: {reason}" for name, reason in e.omitted.items()]
        if e.skipped:
            lines.append(f"  {len(e.skipped)} images skipped:")
            lines += [f"    {name}: {reason}" for name, reason in e.skipped.items()]
        console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def check() -> None:
    """`fewstep eval --selftest`; UserError when a check fails."""
    from fewstep.eval.selftest import selftest

    checks, rows = selftest()
    for c in checks:
        state = f"skipped: {c.skipped}" if c.skipped else ("ok" if c.passed else "FAILED")
        console.print(f"{c.name}: {c.deviation:.2g} (allowed {c.allowed:.2g}) {state}", soft_wrap=True)
    for row in rows:
        console.print(f"FD after {row.step}: {row.value:.4g} ({row.change:+.4g})", soft_wrap=True)
    failed = [c.name for c in checks if not c.passed and not c.skipped]
    if failed:
        raise UserError(f"selftest: {len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}")
