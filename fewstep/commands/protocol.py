"""`fewstep eval --preset`: a protocol on a run, a diffusers folder or a folder of images, by any number of processes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fewstep.commands.sources import Model, Request, check_size, models
from fewstep.config import UserError
from fewstep.eval.features.base import FeatureExtractor
from fewstep.eval.features.clip import ClipScorer, tokenise
from fewstep.eval.features.extractors import build_extractor
from fewstep.eval.protocol.evaluate import (
    Evaluation,
    evaluate,
    format_entry,
    preset_clip,
    preset_reference,
    prompts_digest,
)
from fewstep.eval.protocol.images import ImageFolder
from fewstep.eval.protocol.latency import Latency, measure_latency
from fewstep.eval.protocol.preset import Preset, load_preset, require_files
from fewstep.eval.protocol.prompts import export_images, places, prompts_of
from fewstep.eval.protocol.reference import Reference
from fewstep.eval.protocol.resize import quantise
from fewstep.eval.protocol.runner import Job, Samples, collect, extract_images, run_shards
from fewstep.eval.report import Entry, write_report
from fewstep.files import cache_dir
from fewstep.train.product import open_product

console = Console()
SHOWN = 64
"""Samples of each model in the report."""


@dataclass(frozen=True)
class World:
    """This process among those that were launched together."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Judge:
    """Everything that samples are measured with."""

    preset: Preset
    request: Request
    extractor: FeatureExtractor
    reference: Reference
    prompts: Sequence[str] | None = None
    clip: ClipScorer | None = None

    @property
    def clip_images(self) -> FeatureExtractor | None:
        return self.clip.images if self.clip else None

    def evaluate(self, name: str, samples: Samples | list[Samples], **more: Any) -> Evaluation:
        left_out = dict.fromkeys(self.request.omit, "left out by --omit") | more.pop("omit", {})
        return evaluate(
            name,
            self.preset,
            self.extractor,
            samples,
            self.reference,
            omit=left_out,
            clip=self.clip,
            prompts=self.prompts,
            **more,
        )


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
        check_options(preset, request)
        files = require_files(preset, request.extractor_path, request.clip_path, request.omit)
        check_source(preset, request)
        prompts = prompts_of(preset, files["prompts"]) if "prompts" in files else None
        clip = clip_of(preset, files.get("clip"), prompts)
        extractor = extractor_of(preset, files.get("weights", request.extractor_path))
        by = Judge(preset, request, extractor, preset_reference(preset, extractor), prompts, clip)
        found = [entry_of_folder(by)] if request.images is not None else entries_of_models(by)
        if found:
            show([entry.evaluation for entry in found])
        if found and request.report is not None:
            title = f"{(request.path or request.images).name} by {preset.name}"  # type: ignore[union-attr]
            page = write_report(found, request.report, title)
            console.print(f"report {page}", soft_wrap=True, highlight=False)
        return [entry.evaluation for entry in found]


def extractor_of(preset: Preset, path: Path | None) -> FeatureExtractor:
    """The preset's feature network; ValueError when its weights are not the ones the preset pins."""
    extractor = build_extractor(preset.extractor, path)
    pinned = preset.extractor_file.sha256 if preset.extractor_file else None
    if pinned and not extractor.sha256.startswith(pinned):
        raise ValueError(f"{path}: sha256 {extractor.sha256} is not the {pinned} of preset {preset.name}")
    return extractor


def check_options(preset: Preset, request: Request) -> None:
    """Refuse what would change nothing, or name no metric of the preset."""
    if request.out is not None:
        raise UserError(f"--out: preset {preset.name} measures; only geneval and hpsv2 write images")
    if request.allow_skips and request.images is None:
        raise UserError("--allow-skips: is for a folder of images (--images); samples are never left out")
    unknown = [m for m in request.omit if m not in preset.metrics]
    if unknown:
        raise UserError(f"--omit {unknown[0]}: preset {preset.name} measures {', '.join(preset.metrics)}")
    if request.clip_path is not None and ("clip-score" not in preset.metrics or "clip-score" in request.omit):
        raise UserError(f"--clip-path: preset {preset.name} takes no CLIP score here")


def clip_of(preset: Preset, path: Path | None, prompts: Sequence[str] | None) -> ClipScorer | None:
    """CLIP for the preset's score, None where none is asked for; prompts that do not fit are found now."""
    if path is None:
        return None
    assert preset.clip is not None
    assert prompts is not None
    clip = preset_clip(preset.clip, path)
    tokenise(clip.recipe, prompts)
    return clip


def check_source(preset: Preset, request: Request) -> None:
    """Refuse what cannot be measured before a reference is computed for it, which may take minutes."""
    if request.images is not None:
        if preset.repetitions > 1:
            raise UserError(
                f"--images: preset {preset.name} wants {preset.repetitions} sets of {preset.number} images"
            )
        if request.steps or request.teacher or request.call or request.any_steps:
            raise UserError(
                "--images: the samples are there already, --steps, --any, --teacher and --call change nothing"
            )
        folder = ImageFolder(request.images, preset.channels, preset.number, request.allow_skips)
        if "clip-score" in preset.metrics and "clip-score" not in request.omit:
            check_order([f.relative_to(folder.path) for f in folder.files[: preset.number]])
    elif request.path is not None and not (request.path / "model_index.json").is_file():
        check_size(preset, open_product(request.path).shape, str(request.path))


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


def entry_of_folder(by: Judge) -> Entry:
    """Evaluate ready images, taken in the order of their names."""
    preset, request = by.preset, by.request
    assert request.images is not None
    folder = ImageFolder(request.images, preset.channels, preset.number, request.allow_skips)
    shown: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        for batch in folder.batches(request.batch):
            check_size(preset, tuple(batch.shape[1:]), str(request.images))
            shown.append(batch[: max(0, SHOWN - sum(map(len, shown)))])
            yield batch

    samples = extract_images(batches(), by.extractor, preset.steps, by.clip_images, preset.clip_steps)
    reason = "a folder of images does not say which class was asked for"
    omit = dict.fromkeys(("class-accuracy", "diversity"), reason)
    if folder.skipped:
        omit["clip-score"] = "images were skipped, so it is not known which prompt belongs to which"
    result = by.evaluate(request.images.name, samples, skipped=folder.skipped, omit=omit)
    return Entry(result, None, images=torch.cat(shown))


def entries_of_models(by: Judge) -> list[Entry]:
    """Generate and evaluate at every number of steps; empty on all but the main process."""
    preset, request, extractor, clip = by.preset, by.request, by.extractor, by.clip_images
    assert request.path is not None
    entries = []
    with world() as (place, barrier):
        for network in (extractor, clip):
            if place.device.type != "cpu" and isinstance(network, torch.nn.Module):
                network.to(place.device)
        for model in models(preset, request, by.prompts, place.device):
            jobs = [job_of(by, model, r) for r in range(preset.repetitions)]
            for number, job in enumerate(jobs):
                run_shards(
                    job,
                    shards_of(job, extractor, clip),
                    model.generate(number),
                    extractor,
                    rank=place.rank,
                    world_size=place.size,
                    clip=clip,
                )
            barrier()
            if not place.main:
                continue
            sets = [collect(job, shards_of(job, extractor, clip), extractor, clip) for job in jobs]
            entries.append(entry_of_samples(by, model, sets))
            for samples in sets:
                discard(samples)
        barrier()
    return entries


def entry_of_samples(by: Judge, model: Model, sets: list[Samples]) -> Entry:
    preset, request = by.preset, by.request
    latency: list[Latency] = []
    images = None
    if request.report is not None:
        make = model.generate(0)

        def generate(indices: list[int]) -> Tensor:
            # A small set has fewer conditions than the clock asks for.
            return make([i % preset.number for i in indices])

        first = torch.arange(min(SHOWN, preset.number)).split(request.batch)
        with torch.no_grad():
            images = torch.cat([generate(part.tolist()).cpu() for part in first])
            images = quantise(images, preset.quantiser).round().to(torch.uint8)
            for batch in sorted({1, request.batch}):
                latency.append(measure_latency(generate, batch, repeats=5, warm_up=1))
    seconds = 1000 / latency[-1].images_per_second if latency else None
    result = by.evaluate(model.name, sets, seconds=seconds, calls=model.calls)
    return Entry(result, model.calls, model.group, images, tuple(latency))


def job_of(by: Judge, model: Model, repetition: int) -> Job:
    preset = by.preset
    identity = {"preset": preset.hash, "model": model.digest, "repetition": repetition}
    if by.prompts is not None:
        identity["prompts"] = prompts_digest(by.prompts)
    # Small enough that several processes share a small set, and the same for any number of them.
    shard = max(1, min(500, -(-preset.number // 8)))
    return Job(
        preset.number,
        identity,
        shard,
        by.request.batch,
        preset.quantiser,
        preset.steps,
        clip_chain=preset.clip_steps,
    )


def shards_of(job: Job, extractor: FeatureExtractor, clip: FeatureExtractor | None) -> Path:
    return cache_dir("evaluation") / job.key(extractor, clip)[:24]


def discard(samples: Samples) -> None:
    """Remove the shards of a finished evaluation from the cache."""
    # A killed attempt may have left temporary files; a folder that stays must not cost the result.
    shutil.rmtree(samples.shards[0].parent, ignore_errors=True)


def export(preset: Preset, request: Request) -> None:
    """Write the folder that another package's evaluator reads."""
    if request.path is None or not (request.path / "model_index.json").is_file():
        raise UserError(f"preset {preset.name}: writes images of a diffusers folder; give the path of one")
    if request.out is None:
        raise UserError(f"preset {preset.name}: only writes images; say where with --out FOLDER")
    unused = {"--report": request.report, "--omit": request.omit, "--clip-path": request.clip_path}
    unused |= {"--extractor-path": request.extractor_path, "--allow-skips": request.allow_skips}
    for option, value in unused.items():
        if value:
            raise UserError(
                f"{option}: preset {preset.name} measures nothing, it writes images for another package"
            )
    file = require_files(preset)["prompts"]
    prompts = prompts_of(preset, file)
    places(preset, request.out)
    with world() as (place, barrier):
        if len(request.steps) > 1:
            raise UserError(f"--steps: preset {preset.name} writes one set of images; give one number")
        model = models(preset, request, prompts, place.device)[0]
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
    from fewstep.eval.tools.selftest import selftest

    checks, rows = selftest()
    for c in checks:
        state = f"skipped: {c.skipped}" if c.skipped else ("ok" if c.passed else "FAILED")
        console.print(f"{c.name}: {c.deviation:.2g} (allowed {c.allowed:.2g}) {state}", soft_wrap=True)
    for row in rows:
        console.print(f"FD after {row.step}: {row.value:.4g} ({row.change:+.4g})", soft_wrap=True)
    failed = [c.name for c in checks if not c.passed and not c.skipped]
    if failed:
        raise UserError(f"selftest: {len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}")
