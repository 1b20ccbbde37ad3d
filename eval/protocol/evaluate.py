"""From samples and a reference to numbers: one pass, every metric the preset names, results that refuse
to be mixed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fewstep.eval.features.base import FeatureExtractor
from fewstep.eval.features.clip import ClipRecipe, ClipScorer, clip_images
from fewstep.eval.metrics import measures as metrics
from fewstep.eval.metrics.frechet import FrechetResult, frechet_distance
from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.eval.protocol.preset import ClipScore, Preset, labels_of, locate
from fewstep.eval.protocol.reference import Reference, digits_reference, fashion_reference
from fewstep.eval.protocol.runner import Samples
from torch import Tensor

from fewstep.files import atomic_path, commit, file_sha256


@dataclass
class Evaluation:
    """The result of one evaluation; `as_json` is what is written and reported.

    `metrics` maps a full metric name to a dict with at least ``value``; ``standard_error`` where one is
    known; `omitted` says which of the preset's metrics are not there and why, `skipped` which images were
    left out; `files` are the digests of what the preset may leave open (extractor, reference, prompts, clip);
    `frechet` keeps the full results (one per repetition) for paired differences.
    """

    name: str
    preset: str
    preset_hash: str
    extractor: str
    number: int
    metrics: dict[str, dict[str, Any]]
    environment: dict[str, str]
    seconds: float | None = None
    calls: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    frechet: list[FrechetResult] = field(default_factory=list, repr=False)

    def as_json(self) -> dict[str, Any]:
        """JSON-ready content; NaN becomes null."""
        content = {key: value for key, value in asdict(self).items() if key != "frechet"}
        return _without_nan(content)

    def save(self, path: str | Path) -> Path:
        """Write the JSON atomically."""
        target = Path(path)
        with atomic_path(target) as temporary:
            temporary.write_text(json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read a saved result (without the per-sample influences).

        Raises:
            ValueError: not such a file.
        """
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a result of fewstep eval ({error})") from None


class PresetMismatch(ValueError):
    """Results of different protocols were asked to stand in one table."""


def preset_reference(preset: Preset, extractor: FeatureExtractor) -> Reference:
    """The reference a preset names, checked against the extractor.

    Raises:
        MissingFiles: files the user must supply; ValueError: a reference of another dimension or extractor.
    """
    builtin = {
        "digits": digits_reference,
        "fashion-mnist-train": lambda e: fashion_reference(e, "train"),
        "fashion-mnist-test": lambda e: fashion_reference(e, "test"),
    }
    wanted = preset.reference
    if wanted.kind == "none":
        raise ValueError(f"preset {preset.name}: only exports images, it has no reference")
    if wanted.kind == "builtin":
        if wanted.name not in builtin:
            raise ValueError(f"reference.name: unknown {wanted.name!r}, expected one of {sorted(builtin)}")
        return builtin[wanted.name](extractor)
    assert wanted.file is not None  # a Preset checks it
    path = locate(wanted.file, "reference")
    statistics = FeatureStatistics.load(path)
    if statistics.dim != extractor.dim:
        raise ValueError(f"{path}: dimension {statistics.dim}, but {extractor.name} gives {extractor.dim}")
    made_with = statistics.provenance.get("extractor_sha256")
    if made_with is not None and made_with != extractor.sha256:
        raise ValueError(f"{path}: made with another extractor ({statistics.provenance.get('extractor')})")
    return Reference(wanted.name, statistics, digest=file_sha256(path))


def evaluate(
    name: str,
    preset: Preset,
    extractor: FeatureExtractor,
    samples: Samples | Sequence[Samples],
    reference: Reference,
    *,
    labels: Tensor | None = None,
    seconds: float | None = None,
    calls: int | None = None,
    skipped: Mapping[str, str] | None = None,
    omit: Mapping[str, str] | None = None,
    clip: ClipScorer | None = None,
    prompts: Sequence[str] | None = None,
) -> Evaluation:
    """All metrics of `preset` for generated `samples` (one per repetition).

    Args:
        name: what stands in tables, such as a run's name.
        labels: (N,) the classes asked for; by default the preset's.
        omit: metrics to leave out, with the reason that is reported.
        clip, prompts: for the metric clip-score, beside `samples` with CLIP's features.
        seconds, calls: generation time per 1,000 images and network calls per image, if measured.

    Raises:
        ValueError: another number of samples than the preset's, or a metric that lacks what it needs.
    """
    runs = [samples] if isinstance(samples, Samples) else list(samples)
    if len(runs) != preset.repetitions:
        raise ValueError(
            f"samples: {len(runs)} repetitions, preset {preset.name} asks for {preset.repetitions}"
        )
    for run in runs:
        if len(run.features) != preset.number:
            raise ValueError(f"samples: {len(run.features)}, preset {preset.name} asks for {preset.number}")
    if labels is None and preset.conditions.kind.startswith("labels"):
        labels = torch.tensor(labels_of(preset, list(range(preset.number))))
    prefix = extractor.name
    found: dict[str, dict[str, Any]] = {}
    frechet = [frechet_distance(run.features, reference.statistics) for run in runs]
    first = runs[0]
    omitted: dict[str, str] = {}
    real = reference.features
    for metric in preset.metrics:
        if omit and metric in omit:
            omitted[metric] = omit[metric]
        elif metric in ("kid", "cmmd", "prdc3", "prdc5") and real is None:
            omitted[metric] = "the reference file holds moments only, this metric needs its features"
        elif metric == "clip-score":
            if clip is None or prompts is None or first.clip is None:
                raise ValueError(f"{metric}: needs CLIP, the prompts and CLIP's features of the samples")
            found[clip.recipe.name] = asdict(clip.score(first.clip, prompts))
        elif metric == "fd":
            found[f"FD ({prefix})"] = _frechet_entry(frechet, preset)
        elif metric == "kid":
            found[f"KID ({prefix}, cubic, unbiased)"] = asdict(metrics.kernel_distance(first.features, real))
        elif metric == "cmmd":
            label = f"CMMD ({prefix}, sigma 10, x1000, biased)"
            found[label] = asdict(metrics.cmmd(first.features, real))
        elif metric in ("prdc3", "prdc5"):
            manifold = metrics.manifold(real, first.features, k=int(metric[-1]))
            for key in ("precision", "recall", "density", "coverage"):
                found[f"{key} ({prefix}, k={manifold.k})"] = {"value": getattr(manifold, key)}
        elif metric == "classifier-score":
            found[f"classifier score ({prefix}, 10 splits)"] = asdict(
                metrics.classifier_score(_logits(first, metric))
            )
        elif metric == "class-accuracy":
            estimate = metrics.class_accuracy(_logits(first, metric), _labels(labels, metric))
            found[f"class accuracy ({prefix})"] = asdict(estimate)
        elif metric == "diversity":
            if reference.features is None or reference.labels is None:
                raise ValueError("diversity: the reference holds no features and labels")
            ratios = metrics.within_class_diversity(
                first.features, _labels(labels, metric), reference.features, reference.labels
            )
            values = list(ratios.values())
            entry = {"value": float(np.mean(values)), "minimum": min(values), "per_class": ratios}
            found[f"within-class diversity ({prefix})"] = entry
    return Evaluation(
        name=name,
        preset=preset.name,
        preset_hash=preset.hash,
        extractor=extractor.name,
        number=preset.number,
        metrics=found,
        environment=environment(),
        seconds=seconds,
        calls=calls,
        skipped=dict(skipped or {}),
        omitted=omitted,
        files=_digests(extractor, reference, prompts, clip),
        frechet=frechet,
    )


def prompts_digest(prompts: Sequence[str]) -> str:
    """SHA-256 over the prompts in their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def _digests(
    extractor: FeatureExtractor,
    reference: Reference,
    prompts: Sequence[str] | None,
    clip: ClipScorer | None,
) -> dict[str, str]:
    found = {"extractor": extractor.sha256, "reference": reference.digest}
    found["prompts"] = "" if prompts is None else prompts_digest(prompts)
    found["clip"] = clip.images.sha256 if clip else ""
    return {kind: digest for kind, digest in found.items() if digest}


def comparison_rows(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table, the smallest distance first.

    Raises:
        PresetMismatch: the evaluations do not share one preset hash, or were made with different files.
    """
    hashes = {e.preset_hash: e.preset for e in evaluations}
    if len(hashes) > 1:
        raise PresetMismatch(
            "results of different protocols do not compare: "
            + ", ".join(f"{preset} ({digest})" for digest, preset in sorted(hashes.items()))
        )
    for kind in ("extractor", "reference", "prompts", "clip"):
        files = {e.files[kind]: e.name for e in evaluations if kind in e.files}
        if len(files) > 1:
            raise PresetMismatch(
                f"results with different files ({kind}) do not compare: "
                + ", ".join(f"{name} ({digest[:12]})" for digest, name in sorted(files.items()))
            )
    names = list(dict.fromkeys(metric for e in evaluations for metric in e.metrics))
    ranked = sorted(evaluations, key=_distance)
    header = ["model", "N", *names, "s / 1,000 images", "calls"]
    rows = []
    for e in ranked:
        cells = [e.name, f"{e.number:,}", *(format_entry(e.metrics.get(metric)) for metric in names)]
        cells.append("" if e.seconds is None else f"{e.seconds:.3g}")
        cells.append("" if e.calls is None else str(e.calls))
        rows.append(cells)
    return header, rows


def _distance(e: Evaluation) -> float:
    metric = distance_of(e)
    return 0.0 if metric is None else e.metrics[metric]["value"]


def distance_of(e: Evaluation) -> str | None:
    """What rows are sorted by: the first metric of which less is better, None where there is none."""
    return next((k for k in e.metrics if k.lower().startswith(("fd", "energy", "cmmd", "kid"))), None)


def format_entry(entry: Mapping[str, Any] | None) -> str:
    """One metric as text: value ± error, for FD also b/N and the corrected value or that N is too small."""
    if entry is None:
        return "-"
    text = f"{entry['value']:.4g}"
    error = entry.get("standard_error")
    if error is not None and not math.isnan(error):
        text += f" ± {error:.2g}"
    if entry.get("bias") is not None:
        text += f" (b/N {entry['bias']:.2g}"
        corrected = entry.get("corrected")
        small = ", N too small to correct: see KID or CMMD)"
        text += f", corrected {corrected:.4g})" if corrected is not None else small
    elif str(entry.get("reason", "")).startswith("N too small"):
        text += " (b/N unknown, N too small: see KID or CMMD)"
    return text


def environment() -> dict[str, str]:
    """Versions and hardware that belong beside a measured number."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    for package in ("fewstep", "torch", "numpy", "diffusers", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    found["threads"] = str(torch.get_num_threads())
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found["commit"] = commit()
    return found


def _frechet_entry(results: Sequence[FrechetResult], preset: Preset) -> dict[str, Any]:
    values = [result.value for result in results]
    best = results[int(np.argmin(values))]
    if len(results) == 1:
        return best.as_dict()
    entry = best.as_dict() | {"repetitions": values, "mean": float(np.mean(values))}
    entry["sd"] = float(np.std(values, ddof=1))
    if preset.report == "mean":
        entry |= {"value": entry["mean"], "standard_error": entry["sd"] / math.sqrt(len(values))}
        entry |= {"bias": None, "corrected": None, "usable": False, "reason": "mean of repetitions"}
    return entry


def _logits(samples: Samples, metric: str) -> Tensor:
    if samples.logits is None:
        raise ValueError(f"{metric}: the extractor has no classifier")
    return samples.logits


def _labels(labels: Tensor | None, metric: str) -> Tensor:
    if labels is None:
        raise ValueError(f"{metric}: needs the classes that were asked for")
    return labels


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def preset_clip(clip: ClipScore, path: str | os.PathLike[str]) -> ClipScorer:
    """What a preset's section `clip` asks for, with the checkpoint at `path`; raises as `load_clip`."""
    recipe = ClipRecipe(clip.architecture, clip.prefix, clip.scale, clip.clip_negative, clip.on_long_prompt)
    return ClipScorer(recipe, clip_images(clip.architecture, path, clip.file.sha256))
