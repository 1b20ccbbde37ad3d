"""A preset with everything that it measures with, and whether it is for such samples at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.condition import rows
from fewstep.algebra.views import seen_shape
from fewstep.commands.against import fitted, source_of
from fewstep.commands.sources import BATCH, Model
from fewstep.config import UserError
from fewstep.eval.errors import InputError
from fewstep.eval.features.base import FeatureExtractor
from fewstep.eval.features.clip import ClipScorer, tokenise
from fewstep.eval.features.extractors import build_extractor
from fewstep.eval.features.retrieval import Retrieval
from fewstep.eval.metrics.paired import Paired
from fewstep.eval.protocol.evaluate import evaluate, preset_clip, prompts_digest
from fewstep.eval.protocol.evaluation import LESS_IS_BETTER, Evaluation
from fewstep.eval.protocol.preset import CHAINS, PAIRED, VOXELS, Preset, load_preset, require_files
from fewstep.eval.protocol.prompts import prompts_of
from fewstep.eval.protocol.reference import Reference, Source, preset_reference
from fewstep.eval.protocol.runner import Job, Samples, make_samples, shard_size
from fewstep.files import expanded
from fewstep.networks import code
from fewstep.networks.parts import Site
from fewstep.pictures import PictureError
from fewstep.recipe.schema import Evaluate, default_metric
from fewstep.train.product import Product


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Everything that samples are measured with; `omit` are metrics to leave out, and why; `reward` a run's own."""

    preset: Preset
    extractor: FeatureExtractor
    reference: Reference
    prompts: Sequence[str] | None = None
    clip: ClipScorer | None = None
    retrieval: Retrieval | None = None
    paired: Paired | None = None
    omit: Mapping[str, str] = field(default_factory=dict)
    reward: tuple[str, nn.Module] | None = None
    """What the run calls it, and the network."""

    @property
    def clip_images(self) -> FeatureExtractor | None:
        return self.clip.images if self.clip else None

    def of_distance(self) -> Judge:
        """The same without any metric but the first distance, by which runs are ranked: recall takes minutes."""
        kept = next((m for m in self.preset.metrics if m in LESS_IS_BETTER and m not in self.omit), None)
        others = {m: "not the distance" for m in self.preset.metrics if m not in (kept, *self.omit)}
        return replace(self, clip=None, retrieval=None, paired=None, reward=None, omit={**self.omit, **others})

    def job(self, batch: int, identity: Mapping[str, Any] | None = None) -> Job:
        """What is generated; `identity` tells models apart whose samples lie in one cache."""
        preset = self.preset
        told: dict[str, Any] = {"preset": preset.hash, **(identity or {})}
        if self.prompts is not None:
            told["prompts"] = prompts_digest(self.prompts)
        return Job(
            number=preset.number,
            identity=told,
            shard_size=shard_size(preset.number),
            batch_size=batch,
            quantiser=preset.quantiser,
            chain=preset.steps,
            keep_images=any(part is not None for part in (self.retrieval, self.reward, self.paired)),
            clip_chain=preset.clip_steps,
        )

    def features(self, x: Tensor) -> Tensor:
        """Features (n, k) on the CPU of samples (n, *d) in [-1, 1], as they are measured."""
        job = replace(self.job(len(x)), number=len(x), keep_images=False)
        return make_samples(job, lambda indices: x[indices], self.extractor).features

    def evaluate(self, model: Model, samples: Samples | list[Samples], **more: Any) -> Evaluation:
        """The model's samples, one set per repetition, as numbers; `more` are fields of the Evaluation."""
        found = evaluate(
            model.name,
            self.preset,
            self.extractor,
            samples,
            self.reference,
            labels=model.labels,
            omit={**self.omit, **model.lacks},
            clip=self.clip,
            prompts=self.prompts,
            retrieval=self.retrieval,
            pairs=self.paired,
            group=model.group,
            steps=model.steps,
            calls=model.calls,
            **more,
        )
        first = samples if isinstance(samples, Samples) else samples[0]
        found.metrics |= self._reward(first, model.conditions)
        return found

    @torch.no_grad()
    def _reward(self, samples: Samples, cond: Any) -> dict[str, dict[str, Any]]:
        """The mean reward of the samples, as pictures of 8 bits where they are measured as such; empty without one."""
        if self.reward is None:
            return {}
        name, reward = self.reward
        x = torch.cat(list(samples.images()))
        if self.preset.quantiser is not None:
            x = x.float() / 127.5 - 1
        parts = [slice(i, i + BATCH) for i in range(0, len(x), BATCH)]
        value = torch.cat([reward(x[part], rows(cond, part)).double() for part in parts])
        return {f"reward ({name})": {"value": float(value.mean()), "standard_error": float(value.std() / len(x) ** 0.5)}}


def reward_of(product: Product) -> tuple[str, nn.Module] | None:
    """The reward of a run's recipe, on the CPU; None without one, and for one of latents, of which pictures are none."""
    recipe = product.recipe
    if recipe is None or "reward" not in recipe.roles:
        return None
    code.require(recipe)
    spec = recipe.spec("reward")
    if product.vae is not None:
        if spec.name != "decoded":
            return None
        spec = spec.of
    return spec.name, spec.build(Site(product.picture_shape(), product.classes, {}, 0, product.image))


@contextmanager
def refusals() -> Iterator[None]:
    """What the harness refuses is the user's to mend: one message. Errors of the code itself keep their traceback."""
    try:
        yield
    except (InputError, PictureError, FileNotFoundError, PermissionError, ModuleNotFoundError) as error:
        raise UserError(str(error)) from None


def preset_of(spec: Evaluate, shape: Sequence[int] | None = None) -> Preset:
    """The preset that a recipe names, with the recipe's number of samples and seed; `shape` is that of its samples.

    Raises:
        UserError: no preset was named.
    """
    if spec.metric is None:
        raise UserError(
            "no metric was chosen, and these data have no default; write evaluate.metric=fd (features, against the data "
            "or against=FOLDER), energy for vectors, or another that `fewstep eval --list-presets` names"
        )
    with refusals():
        preset = load_preset(spec.metric)
    metrics = preset.metrics if spec.retrieval is None else [*preset.metrics, "retrieval"]
    preset = replace(preset, number=spec.number, first_seed=spec.seed, metrics=metrics)
    return fitted(preset, spec, shape) if preset.reference.kind == "against" else preset


def open_judge(
    preset: Preset,
    files: Mapping[str, Path],
    *,
    data: Source | None = None,
    retrieval: Retrieval | None = None,
    paired: Paired | None = None,
    extractor_path: Path | None = None,
    omit: Sequence[str] = (),
) -> Judge:
    """Networks, prompts and reference of a preset from `files` (see `require_files`); UserError for what is wrong."""
    with refusals():
        prompts = prompts_of(preset, files["prompts"]) if "prompts" in files else None
        clip = clip_of(preset, files.get("clip"), prompts)
        extractor = extractor_of(preset, files.get("weights", extractor_path))
        reference = preset_reference(preset, extractor, data)
    return Judge(
        preset=preset,
        extractor=extractor,
        reference=reference,
        prompts=prompts,
        clip=clip,
        retrieval=retrieval,
        paired=paired,
        omit=dict.fromkeys(omit, "left out by --omit"),
    )


def judge_of(product: Product, spec: Evaluate) -> Judge:
    """What a recipe is measured with; refuses before a sample is drawn what could not be measured.

    Raises:
        UserError: the preset is not for this product's samples, or a file that it needs is missing.
    """
    recipe: Any = product.recipe
    if spec.metric is None and recipe is not None:
        spec = replace(spec, metric=default_metric(recipe.data))
    try:
        shape = seen_shape(spec.views, product.picture_shape())
    except ValueError as error:
        raise UserError(f"views: {error}") from None
    preset = preset_of(spec, shape)
    with refusals():
        files = require_files(preset)
    check_fit(preset, shape, product.classes)
    captions = None if spec.retrieval is None else captions_of(product, spec.retrieval)
    path = None if spec.extractor_path is None else expanded(spec.extractor_path)
    data = source_of(recipe, spec.against, shape)
    preset, pairs = paired_of(preset, product, spec.samples)
    judge = open_judge(preset, files, data=data, retrieval=captions, paired=pairs, extractor_path=path)
    return replace(judge, reward=reward_of(product))


def paired_of(
    preset: Preset, product: Product | None, samples: int | None = None, omit: Sequence[str] = ()
) -> tuple[Preset, Paired | None]:
    """(the preset, what its samples are compared with row by row); None where it asks for no such metric.

    samples: how many were asked for. Left out, the preset has no more than there are held-out pictures: those that come
    a second time tell nothing of the error over pictures.

    Raises:
        UserError: the samples are not made from pictures that are at hand and held out, or from too few.
    """
    asked = [m for m in preset.metrics if m in PAIRED and m not in omit]
    if not asked:
        return preset, None
    if product is None or product.paired is None:
        raise UserError(
            f"preset {preset.name} measures {', '.join(asked)}, against the pictures that samples were made from; only a "
            "run on data: {name: degraded} has them. Give another preset"
        )
    if not product.held:
        raise UserError(
            f"preset {preset.name} measures {', '.join(asked)}, against pictures that were never trained on, and these "
            "data hold none out; train with data.of.held_out=0.2, or give another preset"
        )
    if samples is not None and samples > product.held:
        raise UserError(
            f"samples {samples}: there are {product.held} held-out pictures; more samples of each come by repetitions of "
            f"the preset, and {preset.name} has {preset.repetitions}"
        )
    preset = replace(preset, number=min(preset.number, product.held))
    return preset, product.paired(preset.number)


def check_fit(preset: Preset, shape: Sequence[int], classes: int | None, what: str = "") -> None:
    """UserError unless the preset is for samples of this shape and number of classes (0 none, None not known).

    `what` names the samples where the message would not.
    """
    told = f"{what}: preset {preset.name}" if what else f"preset {preset.name}"
    if preset.vectors:
        if set(preset.metrics) & set(CHAINS) and (len(shape) != 2 or shape[-1] != 3):
            raise UserError(f"{told} is for chains of points in space, (n, 3); these samples are {list(shape)}")
        solids = bool(set(preset.metrics) & set(VOXELS))
        if solids and tuple(shape) != (8, 8, 8):
            raise UserError(f"{told} is for solids of 8 x 8 x 8 voxels; these samples are {list(shape)}")
        if not solids and len(shape) not in (1, 2):
            raise UserError(f"{told} is for vectors and points; these samples are {list(shape)}")
    else:
        side, channels = preset.size, preset.channels
        right = len(shape) == 3 and shape[0] in ((1, 3) if channels is None else (channels,))
        if not right or (side is not None and tuple(shape[1:]) != (side, side)):
            kind = {None: "images", 1: "grey images", 3: "colour images"}.get(channels, f"{channels}-channel images")
            size = "" if side is None else f"{side} x {side} "
            raise UserError(f"{told} is for {size}{kind}; these samples are {list(shape)}")
    wanted = preset.conditions
    if classes is None:
        return
    free = wanted.kind == "data" and (classes == 0 or wanted.classes is None)
    if not free and classes != (wanted.classes or 0):
        asked = "prompts" if wanted.kind == "prompts" else f"{wanted.classes or 0} classes"
        raise UserError(f"{told} asks for {asked}; these samples are of {classes} classes")
    if classes and "diversity" in preset.metrics and preset.number < 2 * classes:
        raise UserError(
            f"samples {preset.number}: the diversity within a class needs two of each, so at least {2 * classes} for "
            f"{classes} classes"
        )


def extractor_of(preset: Preset, path: Path | None) -> FeatureExtractor:
    """The preset's feature network; InputError when its weights are not the ones the preset pins."""
    extractor = build_extractor(preset.extractor, path)
    pinned = preset.extractor_file.sha256 if preset.extractor_file else None
    if pinned and not extractor.sha256.startswith(pinned):
        raise InputError(f"{path}: sha256 {extractor.sha256} is not the {pinned} of preset {preset.name}")
    return extractor


def clip_of(preset: Preset, path: Path | None, prompts: Sequence[str] | None) -> ClipScorer | None:
    """CLIP for the preset's score, None where none is asked for; prompts that do not fit are found now."""
    if path is None:
        return None
    assert preset.clip is not None
    assert prompts is not None
    clip = preset_clip(preset.clip, path)
    tokenise(clip.recipe, prompts)
    return clip


def captions_of(product: Product, folder: str) -> Retrieval:
    """The retrieval model of a folder; UserError when its captions are not those of the product's data."""
    try:
        retrieval = Retrieval.load(folder)
    except (FileNotFoundError, InputError) as error:
        raise UserError(f"evaluate.retrieval: {error}") from None
    data: Any = product.recipe.data.open() if product.recipe else None
    captions = tuple(getattr(item, "caption", None) for item in getattr(data, "items", ()))
    if captions != retrieval.captions:
        raise UserError(
            f"evaluate.retrieval: {folder} was trained on {len(retrieval.captions)} captions, which are not the "
            f"{len(captions)} of this run's data; train it on them with `fewstep train-retrieval`"
        )
    if tuple(product.picture_shape()[-2:]) != (retrieval.network.size,) * 2:
        raise UserError(
            f"evaluate.retrieval: {folder} takes pictures of {retrieval.network.size} x {retrieval.network.size}, "
            f"these are {list(product.picture_shape())}"
        )
    return retrieval
