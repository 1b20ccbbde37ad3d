"""From samples and a reference to numbers: one pass, every metric that the preset names."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.eval.errors import InputError
from fewstep.eval.features.base import FeatureExtractor
from fewstep.eval.features.clip import ClipRecipe, ClipScorer, clip_images
from fewstep.eval.features.house import house_digits
from fewstep.eval.features.retrieval import Retrieval
from fewstep.eval.metrics import chains, measures, paired, voxels
from fewstep.eval.metrics.energy import energy_distance
from fewstep.eval.metrics.estimate import Estimate
from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.protocol.evaluation import Evaluation, environment
from fewstep.eval.protocol.preset import CHAINS, PAIRED, VOXELS, ClipScore, Preset, labels_of
from fewstep.eval.protocol.reference import Reference
from fewstep.eval.protocol.runner import Samples

Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a metric may look at; `runs` are the samples of each repetition, `frechet` their distances."""

    preset: Preset
    extractor: str
    runs: Sequence[Samples]
    frechet: Sequence[Estimate]
    reference: Reference
    labels: Tensor | None
    clip: ClipScorer | None
    prompts: Sequence[str] | None
    retrieval: Retrieval | None
    paired: paired.Paired | None


def evaluate(
    name: str,
    preset: Preset,
    extractor: FeatureExtractor,
    samples: Samples | Sequence[Samples],
    reference: Reference,
    *,
    labels: Tensor | None = None,
    omit: Mapping[str, str] | None = None,
    clip: ClipScorer | None = None,
    prompts: Sequence[str] | None = None,
    retrieval: Retrieval | None = None,
    pairs: paired.Paired | None = None,
    **more: Any,
) -> Evaluation:
    """All metrics of `preset` for generated `samples` (one per repetition).

    Args:
        name: what stands in tables, such as a run's name.
        labels: (N,) the classes asked for; by default the preset's.
        omit: metrics to leave out, with the reason that is reported.
        clip, prompts: for the metric clip-score, beside `samples` with CLIP's features.
        retrieval: for the metric retrieval, beside `samples` with their images.
        pairs: for the metrics psnr, consistency, sharpness and spread, beside `samples` with their images.
        more: further fields of the Evaluation, such as seconds and calls.

    A metric that lacks what it needs (a classifier, classes, enough samples) is left out, and `omitted` says why; one of
    `NEEDS_MORE` is refused.

    Raises:
        ValueError: another number of samples than the preset's, or not one metric that can be computed.
    """
    runs = [samples] if isinstance(samples, Samples) else list(samples)
    if len(runs) != preset.repetitions:
        raise ValueError(f"samples: {len(runs)} repetitions, preset {preset.name} asks for {preset.repetitions}")
    for run in runs:
        if len(run.features) != preset.number:
            raise ValueError(f"samples: {len(run.features)}, preset {preset.name} asks for {preset.number}")
    if labels is None and preset.conditions.kind.startswith("labels"):
        labels = torch.tensor(labels_of(preset, list(range(preset.number))))
    omitted = {metric: reason for metric, reason in (omit or {}).items() if metric in preset.metrics}
    if reference.features is None:
        short = "the reference file holds moments only, this metric needs its features"
        omitted |= {m: short for m in preset.metrics if m in NEEDS_FEATURES and m not in omitted}
    wanted = [metric for metric in preset.metrics if metric not in omitted]
    frechet = [frechet_distance(run.features, reference.statistics) for run in runs] if "fd" in wanted else []
    inputs = Inputs(
        preset=preset,
        extractor=extractor.name,
        runs=runs,
        frechet=frechet,
        reference=reference,
        labels=labels,
        clip=clip,
        prompts=prompts,
        retrieval=retrieval,
        paired=pairs,
    )
    found: Entries = {}
    for metric in wanted:
        try:
            found |= METRICS[metric](inputs)
        except ValueError as error:  # no classifier, no classes, too few samples: the other metrics still hold
            if metric in NEEDS_MORE:
                raise
            omitted[metric] = str(error).removeprefix(f"{metric}: ")
    if not found:
        reasons = "; ".join(f"{metric}: {reason}" for metric, reason in omitted.items())
        raise ValueError(f"preset {preset.name}: none of its metrics can be computed here ({reasons})")
    return Evaluation(
        name=name,
        preset=preset.name,
        preset_hash=preset.hash,
        extractor=extractor.name,
        number=preset.number,
        metrics=found,
        environment=environment(),
        omitted=omitted,
        files=_digests(extractor, reference, prompts, clip, retrieval),
        reference=reference.about,
        frechet=frechet,
        **more,
    )


def prompts_digest(prompts: Sequence[str]) -> str:
    """SHA-256 over the prompts in their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def preset_clip(clip: ClipScore, path: str | os.PathLike[str]) -> ClipScorer:
    """What a preset's section `clip` asks for, with the checkpoint at `path`; raises as `load_clip`."""
    recipe = ClipRecipe(clip.architecture, clip.prefix, clip.scale, clip.clip_negative, clip.on_long_prompt)
    return ClipScorer(recipe, clip_images(clip.architecture, path, clip.file.sha256))


def _fd(i: Inputs) -> Entries:
    values = [result.value for result in i.frechet]
    entry = i.frechet[int(np.argmin(values))].as_dict()
    if len(values) > 1:
        entry |= {"repetitions": values, "mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
        if i.preset.report == "mean":
            entry |= {"value": entry["mean"], "standard_error": entry["sd"] / math.sqrt(len(values))}
            entry |= {"bias": None, "corrected": None, "usable": False, "reason": "mean of repetitions"}
    return {f"FD ({i.extractor})": entry}


def _kid(i: Inputs) -> Entries:
    estimate = measures.kernel_distance(i.runs[0].features, _real(i, "kid"))
    return {f"KID ({i.extractor}, cubic, unbiased)": estimate.as_dict()}


def _cmmd(i: Inputs) -> Entries:
    estimate = measures.cmmd(i.runs[0].features, _real(i, "cmmd"))
    return {f"CMMD ({i.extractor}, sigma 10, x1000, biased)": estimate.as_dict()}


def _prdc(k: int) -> Callable[[Inputs], Entries]:
    def entries(i: Inputs) -> Entries:
        real = _real(i, f"prdc{k}")
        fewest = min(len(real), len(i.runs[0].features))
        if fewest <= k:
            raise InputError(f"prdc{k}: {fewest} pictures have no {k} neighbours")
        manifold = measures.manifold(real, i.runs[0].features, k=k)
        names = ("precision", "recall", "density", "coverage")
        return {f"{name} ({i.extractor}, k={k})": {"value": getattr(manifold, name)} for name in names}

    return entries


def _classifier_score(i: Inputs) -> Entries:
    estimate = measures.classifier_score(_logits(i, "classifier-score"))
    return {f"classifier score ({i.extractor}, 10 splits)": estimate.as_dict()}


def _class_accuracy(i: Inputs) -> Entries:
    logits, labels = _logits(i, "class-accuracy"), _labels(i, "class-accuracy")
    own = logits.shape[1]
    if i.reference.labels is not None and (real := len(i.reference.labels.unique())) != own:
        raise ValueError(f"class-accuracy: the extractor tells {own} classes apart, the data has {real} others")
    estimate = measures.class_accuracy(logits, labels)
    return {f"class accuracy ({i.extractor})": estimate.as_dict()}


def _diversity(i: Inputs) -> Entries:
    reference = i.reference
    if reference.features is None or reference.labels is None:
        raise InputError("diversity: the reference holds no features and labels")
    labels = _labels(i, "diversity")
    ratios = measures.within_class_diversity(i.runs[0].features, labels, reference.features, reference.labels)
    values = list(ratios.values())
    entry = {"value": sum(values) / len(values), "minimum": min(values), "per_class": ratios}
    return {f"within-class diversity ({i.extractor})": entry}


def _energy(i: Inputs) -> Entries:
    value = energy_distance(i.runs[0].features.double(), _real(i, "energy").double())
    return {"energy x1000": {"value": 1000 * value}}


def _traces(i: Inputs) -> tuple[Tensor, Tensor]:
    """Samples and as many real chains (N, n, 3), in Angstrom."""
    x, y = i.runs[0].features, _real(i, "chains")
    n = min(len(x), len(y))
    return 10 * x[:n].reshape(n, -1, 3), 10 * y[:n].reshape(n, -1, 3)


def _each(
    name: str,
    unit: str,
    values: Callable[[Tensor], Tensor],
    seen: Callable[[Inputs], tuple[Tensor, Tensor]] = _traces,
) -> Callable[[Inputs], Entries]:
    """A mean over samples, with the data's own in the name."""

    def entries(i: Inputs) -> Entries:
        x, y = (values(each).double() for each in seen(i))
        error = float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.nan
        told = Estimate(value=float(x.mean()), standard_error=error, n=len(x))
        return {f"{name} (data {float(y.mean()):.3g}{unit})": told.as_dict()}

    return entries


def _gyration(i: Inputs) -> Entries:
    x, y = (chains.gyration(chain) for chain in _traces(i))
    name = f"radius of gyration, W1 (samples {float(x.mean()):.2f}, data {float(y.mean()):.2f} A)"
    return {name: {"value": chains.wasserstein(x, y)}}


def _nna(i: Inputs) -> Entries:
    x, y = (chains.distances(chain) for chain in _traces(i))
    return {"1-NNA (0.5 is the best)": chains.one_nearest_neighbour(x, y).as_dict()}


def _solids(i: Inputs) -> tuple[Tensor, Tensor]:
    """Samples and real solids (N, 8, 8, 8)."""
    return i.runs[0].features.reshape(-1, 8, 8, 8), _real(i, "voxels").reshape(-1, 8, 8, 8)


def _overlap(i: Inputs) -> Entries:
    return {"IoU with the nearest real solid": voxels.nearest_overlap(*_solids(i)).as_dict()}


def _nna_voxels(i: Inputs) -> Entries:
    x, y = (voxels.filled(v).flatten(1).double() for v in _solids(i))
    n = min(len(x), len(y))
    return {"1-NNA (0.5 is the best)": chains.one_nearest_neighbour(x[:n], y[:n]).as_dict()}


def _class_of_heights(i: Inputs) -> Entries:
    pictures = (255 * (voxels.heights(_solids(i)[0]) + 1) / 2).float()
    with torch.no_grad():
        logits = house_digits().logits(pictures)
    estimate = measures.class_accuracy(logits, _labels(i, "class-accuracy-of-heights"))
    return {"class accuracy (heights, house-digits)": estimate.as_dict()}


def _clip_score(i: Inputs) -> Entries:
    if i.clip is None or i.prompts is None or i.runs[0].clip is None:
        raise InputError("clip-score: needs CLIP, the prompts and CLIP's features of the samples")
    return {i.clip.recipe.name: i.clip.score(i.runs[0].clip, i.prompts).as_dict()}


def _retrieval(i: Inputs) -> Entries:
    if i.retrieval is None:
        raise InputError("retrieval: needs a model that finds captions; a recipe names it in evaluate.retrieval")
    pixels = torch.cat(list(i.runs[0].images()))
    count = len(i.retrieval.captions)
    # Sample i was asked for caption i mod count.
    estimate = i.retrieval.accuracy(pixels, torch.arange(len(pixels)) % count, min(100, count))
    return {f"caption found among {min(100, count)}": estimate.as_dict()}


def _drawn(i: Inputs, metric: str) -> tuple[paired.Paired, list[Tensor]]:
    """What the samples were made from, and the sets of samples in [-1, 1]."""
    if i.paired is None:
        raise InputError(f"{metric}: needs the pictures that samples were made from; they are a run's on data degraded")
    return i.paired, [torch.cat(list(run.images())).float() / 127.5 - 1 for run in i.runs]


def _psnr(i: Inputs) -> Entries:
    pairs, sets = _drawn(i, "psnr")
    entries = {"PSNR of a sample (dB)": paired.psnr(sets[0], pairs.truth).as_dict()}
    if len(sets) > 1:
        mean = torch.stack(sets).mean(0)
        entries[f"PSNR of the mean of {len(sets)} (dB)"] = paired.psnr(mean, pairs.truth).as_dict()
    return entries


def _consistency(i: Inputs) -> Entries:
    pairs, sets = _drawn(i, "consistency")
    return {"consistency |A(x) - c|": paired.consistency(sets[0], pairs).as_dict()}


def _sharpness(i: Inputs) -> Entries:
    pairs, sets = _drawn(i, "sharpness")
    real = paired.sharpness(pairs.truth).value
    return {f"sharpness (data {real:.3f})": paired.sharpness(sets[0]).as_dict()}


def _spread(i: Inputs) -> Entries:
    _, sets = _drawn(i, "spread")
    return {f"spread of {len(sets)}": paired.spread(sets).as_dict()}


METRICS: dict[str, Callable[[Inputs], Entries]] = {
    "fd": _fd,
    "kid": _kid,
    "cmmd": _cmmd,
    "prdc3": _prdc(3),
    "prdc5": _prdc(5),
    "classifier-score": _classifier_score,
    "class-accuracy": _class_accuracy,
    "diversity": _diversity,
    "energy": _energy,
    "clip-score": _clip_score,
    "retrieval": _retrieval,
    "psnr": _psnr,
    "consistency": _consistency,
    "sharpness": _sharpness,
    "spread": _spread,
    "bond-error": _each("bond error", " A", chains.bond_errors),
    "clashes": _each("chains with a clash", "", chains.clashing),
    "gyration": _gyration,
    "1-nna": _nna,
    "holes": _each("hanging voxels", "", voxels.holes, _solids),
    "overlap": _overlap,
    "1-nna-voxels": _nna_voxels,
    "class-accuracy-of-heights": _class_of_heights,
    "handedness": _each("right-handed turns", "", chains.right_handed),
}
NEEDS_MORE = ("clip-score", "retrieval", *PAIRED)
"""Metrics of what the caller hands over beside the samples; to do without them is for `omit` to say."""
NEEDS_FEATURES = ("kid", "cmmd", "prdc3", "prdc5", "energy", *CHAINS, *VOXELS)


def _real(i: Inputs, metric: str) -> Tensor:
    if i.reference.features is None:
        raise InputError(f"{metric}: the reference holds no features")
    return i.reference.features


def _logits(i: Inputs, metric: str) -> Tensor:
    logits = i.runs[0].logits
    if logits is None:
        raise InputError(f"{metric}: the extractor has no classifier")
    return logits


def _labels(i: Inputs, metric: str) -> Tensor:
    if i.labels is None:
        raise InputError(f"{metric}: needs the classes that were asked for")
    return i.labels


def _digests(
    extractor: FeatureExtractor,
    reference: Reference,
    prompts: Sequence[str] | None,
    clip: ClipScorer | None,
    retrieval: Retrieval | None,
) -> dict[str, str]:
    found = {"extractor": extractor.sha256, "reference": reference.digest}
    found["prompts"] = "" if prompts is None else prompts_digest(prompts)
    found["clip"] = clip.images.sha256 if clip else ""
    found["retrieval"] = retrieval.sha256 if retrieval else ""
    return {kind: digest for kind, digest in found.items() if digest}
