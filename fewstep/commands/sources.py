"""What `fewstep eval` can measure: a run at its numbers of steps, its teacher, any diffusers folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fewstep.commands.measure import teacher_product
from fewstep.config import UserError, plain
from fewstep.eval.features.base import state_sha256
from fewstep.eval.protocol.pipelines import count_calls, pipeline_generate
from fewstep.eval.protocol.preset import Preset, labels_of
from fewstep.files import file_sha256
from fewstep.train.product import Product, open_product

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
    clip_path: Path | None = None
    omit: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """Something to evaluate: `generate(repetition)` gives the seam of `fewstep.eval.protocol.runner`.

    `digest` identifies weights and settings; `calls` are network calls per image.
    """

    name: str
    group: str
    steps: int
    calls: int
    digest: str
    generate: Callable[[int], Generate]


def check_size(preset: Preset, shape: Sequence[int], what: str) -> None:
    wanted = (preset.channels, preset.size, preset.size)
    if tuple(shape) != wanted:
        raise UserError(f"{what}: images are {list(shape)}, preset {preset.name} is for {list(wanted)}")


def models(
    preset: Preset, request: Request, prompts: Sequence[str] | None, device: torch.device
) -> list[Model]:
    """A run at its steps (and its teacher's), or a diffusers pipeline as diffusers itself calls it."""
    assert request.path is not None
    if (request.path / "model_index.json").is_file():
        if request.teacher:
            raise UserError(f"--teacher: {request.path} is a diffusers folder; only a run knows its teacher")
        return pipelines(preset, request, prompts, device)
    if request.call:
        raise UserError(f"--call: {request.path} is not a diffusers folder; only a pipeline takes arguments")
    product = open_product(request.path)
    check_size(preset, product.shape, str(request.path))
    if prompts is not None or product.classes != (preset.conditions.classes or 0):
        wanted = "prompts" if prompts is not None else f"{preset.conditions.classes or 0} classes"
        raise UserError(
            f"{request.path}: was trained with {product.classes} classes, preset {preset.name} asks for {wanted}"
        )
    product.net.to(device)
    found = [product.with_steps(n, request.any_steps) for n in request.steps] or [product]
    out = [of_product(preset, p, request.path.name) for p in found]
    if request.teacher:
        out += [of_product(preset, p, "teacher") for p in teachers(product, request.teacher, device)]
    return out


def teachers(product: Product, steps: Sequence[int], device: torch.device) -> list[Product]:
    """The teacher of a run at several numbers of Heun steps."""
    from fewstep.train.build import build_roles

    recipe = product.recipe
    assert recipe is not None
    if recipe.teacher is None:
        raise UserError(f"--teacher: {product.title} has none")
    teacher = build_roles(recipe, recipe.data.open()).teacher.to(device)  # type: ignore[attr-defined]
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


def pipelines(
    preset: Preset, request: Request, prompts: Sequence[str] | None, device: torch.device
) -> list[Model]:
    """A diffusers folder at every number of steps asked for; an export knows its own."""
    path = request.path
    assert path is not None
    note = path / "fewstep.json"
    known = json.loads(note.read_text()).get("steps") if note.is_file() else None
    steps = request.steps or ((len(known),) if known else ())
    if not steps:
        raise UserError(f"{path}: does not say how many steps it takes; give --steps")
    pipeline = load_pipeline(path, device)
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
