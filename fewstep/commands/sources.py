"""What `fewstep eval` can measure: a run at its numbers of steps, its teacher, any diffusers folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fewstep.algebra.condition import moved, rows
from fewstep.algebra.draws import Draws, fold
from fewstep.config import UserError, plain
from fewstep.eval.features.base import state_sha256
from fewstep.eval.protocol.pipelines import count_calls, pipeline_generate
from fewstep.eval.protocol.preset import Preset, labels_of
from fewstep.files import file_sha256, read_json
from fewstep.networks.controlnet import CONTROLNET_PIPELINES
from fewstep.train.note import LEVELS, read_note
from fewstep.train.product import Product

Generate = Callable[[list[int]], Tensor]
BATCH = 256
"""Samples of one call, of a run's product."""
PIPELINE_BATCH = 64
CLASS_METRICS = ("class-accuracy", "diversity")


@dataclass(frozen=True, kw_only=True)
class Model:
    """Something to evaluate: `generate(repetition)` gives the seam of `fewstep.eval.protocol.runner`.

    `digest()` identifies weights and settings; `calls` are network calls per image; `labels` are the classes asked for
    where the preset leaves them to the model; `conditions` those of all samples, by a run's own product; `lacks` are
    metrics that it cannot have, and why.
    """

    name: str
    group: str
    steps: int | None
    calls: float | None
    digest: Callable[[], str]
    generate: Callable[[int], Generate]
    labels: Tensor | None = None
    conditions: Any = None
    lacks: Mapping[str, str] = field(default_factory=dict)


def of_product(preset: Preset, product: Product, group: str, name: str | None = None) -> Model:
    """A run's student or teacher: sample i of repetition r is number i + r N of the seed."""
    steps = len(product.sampler.steps)
    own = product.labels(preset.number) if preset.conditions.kind == "data" else None
    decode = product.decoder()
    views = product.recipe.evaluate.views if product.recipe is not None and product.recipe.evaluate is not None else ()

    def generate(repetition: int) -> Generate:
        first = repetition * preset.number

        @torch.no_grad()
        def images(indices: list[int]) -> Tensor:
            device = product.device()
            index = torch.tensor([first + i for i in indices], device=device)
            labels: Any = None
            if own is not None:
                labels = moved(rows(own, torch.tensor(indices)), device)
            elif product.classes:
                labels = torch.tensor(labels_of(preset, indices), device=device)
            seen = decode(product.images(index, labels, preset.first_seed))
            for view in views:
                seen = view.see(seen, Draws(fold("measured through"), index))
            return seen

        return images

    def digest() -> str:
        told = [state_sha256(product.net), plain(product.sampler), product.vae, *map(plain, views)]
        if (help_ := product.assist) is not None:
            told += [plain(help_.part), state_sha256(help_.teacher), str(help_.threshold)]
        content = json.dumps(told)
        return hashlib.sha256(content.encode()).hexdigest()

    asked = torch.tensor(labels_of(preset, list(range(preset.number)))) if own is None and product.classes else own
    classes = own if isinstance(own, Tensor) else None
    if product.paired is not None:
        classes = product.paired(preset.number).labels
    reason = "these samples are of no classes"
    free = preset.conditions.kind == "data" and classes is None
    return Model(
        name=name or f"{group}, {steps} step{'s' * (steps > 1)}",
        group=group,
        steps=steps,
        calls=product.network_calls(),
        digest=digest,
        generate=generate,
        labels=classes,
        conditions=asked,
        lacks=dict.fromkeys(CLASS_METRICS, reason) if free else {},
    )


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


def refuse_pictures(path: Path) -> None:
    """UserError for a folder whose pipeline cannot be called without a picture."""
    file = path / "model_index.json"
    kind = read_json(file).get("_class_name") if file.is_file() else None
    if kind in CONTROLNET_PIPELINES:
        raise UserError(f"{path}: makes samples from a picture; draw from it with diffusers' {kind}, as its card shows")


def called(path: Path, n: int | None, any_steps: bool) -> tuple[int, dict[str, Any]]:
    """(n, the arguments that make a folder's pipeline draw in n steps): an export's own, as its fewstep.json says.

    Raises UserError where nobody says how many steps, and for a student that was trained for another number.
    """
    refuse_pictures(path)
    note = read_note(path)
    if note.sampler is None:
        if n is None:
            raise UserError(f"{path}: does not say how many steps it takes; give --steps")
        return n, {"num_inference_steps": n}
    if "strength" in note.call:
        raise UserError(f"{path}: goes on from a picture; draw from it with diffusers as its card shows")
    own = len(note.sampler.steps)
    if n is None or n == own:
        return own, {**note.settings, **note.call}
    if not any_steps:
        raise UserError(f"--steps {n}: this student was trained for {own}; add --any to try it anyway")
    rest = {k: v for k, v in note.call.items() if k not in LEVELS}
    return n, {**note.settings, **rest, "num_inference_steps": n}


def of_pipeline(
    preset: Preset,
    path: Path,
    *,
    steps: Sequence[int],
    call: Sequence[str],
    prompts: Sequence[str] | None,
    device: torch.device,
    check: Callable[[Sequence[int]], None],
    any_steps: bool = False,
) -> list[Model]:
    """A diffusers folder as diffusers calls it, at every number of steps asked for; an export as its card calls it.

    `call` changes single arguments. `check` is given the shape of an image before the rest is made.
    """
    wanted = [called(path, n, any_steps) for n in steps or (None,)]
    pipeline = load_pipeline(path, device)
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    given = arguments(call)
    content = [[str(p.relative_to(path)), file_sha256(p)] for p in files]
    labels, asked = labels_for(preset, network)
    out = []
    for n, own in wanted:
        told = own | given

        def generate(repetition: int, told: dict[str, Any] = told) -> Generate:
            return pipeline_generate(
                pipeline,
                seed=preset.seeds(repetition).start,
                labels=labels,
                prompts=prompts,
                **told,
            )

        try:
            calls = count_calls(network, generate(0), [0]) if network is not None else n
            image = generate(0)([0])
        except (TypeError, KeyError) as error:
            raise UserError(f"{path}: its pipeline cannot be called like that: {error}") from None
        check(image.shape[1:])
        digest = hashlib.sha256(json.dumps([content, n, told], default=str).encode()).hexdigest()
        free = preset.conditions.kind == "data" and asked is None
        out.append(
            Model(
                name=f"{path.name}, {n} step{'s' * (n > 1)}",
                group=path.name,
                steps=n,
                calls=calls,
                digest=lambda digest=digest: digest,
                generate=generate,
                labels=asked,
                lacks=dict.fromkeys(CLASS_METRICS, "its samples are of no classes") if free else {},
            )
        )
    return out


def labels_for(preset: Preset, network: Any) -> tuple[Callable[[list[int]], list[int]] | None, Tensor | None]:
    """The classes that a pipeline is asked for, None for none: the preset's, or those of its network in turn."""
    if preset.conditions.kind != "data":
        return ((lambda i: labels_of(preset, i)) if preset.conditions.classes else None), None
    count = getattr(getattr(network, "config", None), "num_class_embeds", None)
    if not count or not preset.conditions.classes:
        return None, None
    if count < preset.conditions.classes:
        raise UserError(f"preset {preset.name} is for {preset.conditions.classes} classes; this network has {count}")
    classes = preset.conditions.classes
    return (lambda i: [index % classes for index in i]), torch.arange(preset.number) % classes
