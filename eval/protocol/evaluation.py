"""The result of one evaluation, and tables that refuse to mix protocols."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.config import UserError
from fewstep.eval.errors import InputError
from fewstep.eval.metrics.estimate import Estimate
from fewstep.eval.protocol.latency import Latency
from fewstep.files import atomic_path, commit, read_json

FILES = ("extractor", "reference", "prompts", "clip", "retrieval")
"""What a preset may leave open, whose digests stand in every result."""
LESS_IS_BETTER = ("fd", "energy", "cmmd", "kid")


@dataclass(kw_only=True)
class Evaluation:
    """A model at one number of steps under one preset; `as_json` is what is written and reported.

    Attributes:
        name: what stands in tables, such as a run's name.
        group: joins evaluations of one model in plots.
        number: images (or vectors) measured.
        metrics: a full metric name to a dict with at least ``value``; ``standard_error`` where one is known.
        seconds: warm seconds per 1,000 images, see `fewstep.eval.protocol.latency.seconds_per_1000`.
        calls: network calls per image; None where it is not known how the images came about.
        steps: steps of the sampler.
        training: what the model had cost, as `fewstep compare` counts it.
        skipped: images that were left out, and why; omitted: metrics of the preset that are not there, and why.
        files: sha256 of what was used, by FILES.
        reference: what was compared with, in words: of what, how many, and whether the model was trained on it.
        frechet: the distances with the influence of each sample, one per repetition, for paired differences.
        images: pixels (N, C, H, W) uint8 of the first global indices, the same indices for every model.
    """

    name: str
    preset: str
    preset_hash: str
    extractor: str
    number: int
    metrics: dict[str, dict[str, Any]]
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    calls: float | None = None
    steps: int | None = None
    group: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    reference: str = ""
    latency: tuple[Latency, ...] = ()
    frechet: list[Estimate] = field(default_factory=list, repr=False, compare=False)
    images: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def distance(self) -> Estimate:
        """What rows are ranked by: the first metric of which less is better.

        Raises:
            ValueError: the preset has none.
        """
        metric = distance_of(self)
        if metric is None:
            raise ValueError(f"preset {self.preset}: measures no distance, so nothing ranks {self.name}")
        entry = self.metrics[metric]
        return Estimate(value=entry["value"], standard_error=entry.get("standard_error"), n=self.number)

    def value(self, start: str) -> float | None:
        """The value of the first metric whose name starts so, such as ``class accuracy``; None without it."""
        found = (entry["value"] for name, entry in self.metrics.items() if name.startswith(start))
        return next(found, None)

    def as_json(self) -> dict[str, Any]:
        """JSON-ready content; NaN becomes null."""
        names = [f.name for f in fields(self) if f.name not in ("frechet", "images", "latency")]
        content = {name: getattr(self, name) for name in names}
        return _without_nan(content | {"latency": [asdict(item) for item in self.latency]})

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Evaluation:
        """What `as_json` gave, without pictures and the per-sample influences.

        Raises:
            ValueError: other content.
        """
        try:
            latency = tuple(Latency(**item) for item in content["latency"])
            return cls(**{**content, "latency": latency})
        except (TypeError, KeyError) as error:
            raise InputError(f"not a result of fewstep eval ({error})") from None

    def save(self, path: str | Path) -> Path:
        """Write the JSON atomically."""
        target = Path(path)
        with atomic_path(target) as temporary:
            temporary.write_text(json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read a saved result. ValueError: not such a file."""
        try:
            return cls.from_json(read_json(Path(path)))
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        except UserError as error:
            raise InputError(str(error)) from None


class PresetMismatch(ValueError):
    """Results of different protocols were asked to stand in one table."""


def check_alike(evaluations: Sequence[Evaluation]) -> None:
    """Raise PresetMismatch unless all share one preset hash and were made with the same files."""
    hashes = {e.preset_hash: e.preset for e in evaluations}
    if len(hashes) > 1:
        raise PresetMismatch(
            "results of different protocols do not compare: "
            + ", ".join(f"{preset} ({digest})" for digest, preset in sorted(hashes.items()))
        )
    for kind in FILES:
        files = {e.files[kind]: e.name for e in evaluations if kind in e.files}
        if len(files) > 1:
            raise PresetMismatch(
                f"results with different files ({kind}) do not compare: "
                + ", ".join(f"{name} ({digest[:12]})" for digest, name in sorted(files.items()))
            )


Columns = Mapping[str, Callable[[Evaluation], str]]
"""Further columns of a table by their heading."""


def comparison_rows(
    evaluations: Sequence[Evaluation], columns: Columns | None = None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table, the smallest distance first, `columns` after the name; raises as `check_alike`."""
    check_alike(evaluations)
    names = list(dict.fromkeys(metric for e in evaluations for metric in e.metrics))
    costs = list(dict.fromkeys(cost for e in evaluations for cost in e.training))
    ranked = sorted(evaluations, key=lambda e: e.distance.value if distance_of(e) else 0.0)
    further = columns or {}
    header = ["model", *further, "N", *names, "s / 1,000 images", "calls"]
    header += [f"training {cost.replace('_', ' ')}" for cost in costs]
    rows = []
    for e in ranked:
        cells = [
            e.name,
            *(cell(e) for cell in further.values()),
            f"{e.number:,}",
            *(format_entry(e.metrics.get(metric)) for metric in names),
        ]
        cells.append("" if e.seconds is None else f"{e.seconds:.3g}")
        cells.append("" if e.calls is None else str(e.calls))
        rows.append(cells + [_cost(e.training.get(cost, "")) for cost in costs])
    return header, rows


def distance_of(e: Evaluation) -> str | None:
    """The name of the first metric of which less is better, None where there is none."""
    return next((k for k in e.metrics if k.lower().startswith(LESS_IS_BETTER)), None)


def format_entry(entry: Mapping[str, Any] | None) -> str:
    """One metric as text: value ± error, for FD also b/N and the corrected value or that N is too small."""
    if entry is None or entry["value"] is None:
        return "-"
    text = f"{entry['value']:.4g}"
    error = entry.get("standard_error")
    if error is not None and not math.isnan(error):
        text += f" ± {error:.2g}"
    if entry.get("spread") is not None:
        text += f" (spread over {len(entry['values'])} seeds {entry['spread']:.2g})"
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


def _cost(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
