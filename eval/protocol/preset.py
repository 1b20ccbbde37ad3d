"""Evaluation protocols as data: everything that changes the number is in the preset, and the preset has
a hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from fewstep.eval.errors import InputError
from fewstep.eval.protocol.resize import OPERATIONS, QUANTISERS, Step
from fewstep.files import cache_dir, file_sha256, text_of

FOLDER = Path(__file__).parents[1] / "presets"
_STRICT = ConfigDict(extra="forbid", strict=True)


@checked_dataclass(frozen=True, config=_STRICT)
class File:
    """A file the protocol needs and fewstep does not ship.

    `sha256` may be null where the publisher gives none and none was verified here: the digest found is then
    part of every result.
    """

    name: str
    licence: str
    source: str
    sha256: str | None = None


@checked_dataclass(frozen=True, config=_STRICT)
class Conditions:
    """What the generator is asked for at each global index.

    ``none``; ``labels-cycle`` (index mod classes); ``labels-random`` (a seeded draw per index); ``prompts``
    (line `index` of `file`); ``data`` (what the model's own data hands out in turn: classes, captions or nothing; with
    `classes`, where it has classes these many).
    """

    kind: Literal["none", "labels-cycle", "labels-random", "prompts", "data"]
    classes: int | None = None
    file: File | None = None


@checked_dataclass(frozen=True, config=_STRICT)
class Reference:
    """What is compared with: a ``builtin`` data set, a statistics ``file``, the run's own ``data``, or what the command
    line or a recipe names, ``against``; ``none`` for export-only protocols.
    """

    kind: Literal["builtin", "file", "data", "against", "none"]
    name: str
    file: File | None = None
    images: int | None = None


@checked_dataclass(frozen=True, config=_STRICT)
class ResizeStep:
    """One step of the chain, see `fewstep.eval.protocol.resize.OPERATIONS`."""

    op: str
    size: int | None = None


@checked_dataclass(frozen=True, config=_STRICT)
class ClipScore:
    """How the CLIP score is taken: the fields of `fewstep.eval.features.clip.ClipRecipe`, the chain before CLIP's own
    normalisation, and the open-clip checkpoint.
    """

    architecture: str
    file: File
    chain: list[ResizeStep]
    prefix: str = ""
    scale: float = 1.0
    clip_negative: bool = False
    on_long_prompt: Literal["error", "keep-eot"] = "error"


@checked_dataclass(frozen=True, config=_STRICT)
class Preset:
    """One protocol. `title` and `notes` are for people; every other field enters the hash.

    `size` and `channels` of null take any size, and one or three channels. The extractor ``vectors`` is for samples that
    are no images, vectors and points: they are compared as they are, without quantiser and chain. `first_seed` numbers
    the noise: a pipeline's image i starts from a generator of seed `first_seed` + i, a run's from sample i of that seed.
    """

    name: str
    title: str
    number: int
    size: int | None
    channels: int | None
    conditions: Conditions
    quantiser: str | None
    chain: list[ResizeStep]
    extractor: str
    reference: Reference
    metrics: list[str]
    repetitions: int = 1
    first_seed: int = 0
    report: Literal["mean", "min"] = "mean"
    extractor_file: File | None = None
    images_per_prompt: int = 1
    clip: ClipScore | None = None
    notes: str = ""

    def __post_init__(self) -> None:
        problems = []
        if self.vectors:
            if any((self.size, self.channels, self.quantiser, self.chain)):
                problems.append("extractor: vectors take no size, channels, quantiser or chain")
        elif self.quantiser not in QUANTISERS:
            problems.append(f"quantiser: {self.quantiser!r} is not one of {sorted(QUANTISERS)}")
        for name, chain in (("chain", self.chain), ("clip.chain", self.clip.chain if self.clip else ())):
            for step in chain:
                if step.op not in OPERATIONS:
                    problems.append(f"{name}: {step.op!r} is not one of {sorted(OPERATIONS)}")
                elif step.op != "centre-square" and (step.size is None or step.size < 1):
                    problems.append(f"{name}: {step.op!r} needs a size of at least 1")
        for metric in self.metrics:
            if metric not in METRICS:
                problems.append(f"metrics: {metric!r} is not one of {sorted(METRICS)}")
        if self.number < 1 or self.repetitions < 1 or self.images_per_prompt < 1:
            problems.append("number, repetitions, images_per_prompt: expected at least 1")
        if self.conditions.kind.startswith("labels") and not self.conditions.classes:
            problems.append("conditions.classes: needed for labels")
        if self.conditions.kind == "prompts" and self.conditions.file is None:
            problems.append("conditions.file: needed for prompts")
        if "clip-score" in self.metrics and (self.clip is None or self.conditions.kind != "prompts"):
            problems.append("metrics: clip-score needs the section clip and conditions of kind 'prompts'")
        if self.reference.kind == "file" and self.reference.file is None:
            problems.append("reference.file: needed for a reference of kind 'file'")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def vectors(self) -> bool:
        """Whether samples are vectors, not images."""
        return self.extractor == "vectors"

    @property
    def steps(self) -> list[Step]:
        """The chain before the feature network."""
        return _steps(self.chain)

    @property
    def clip_steps(self) -> list[Step]:
        """The chain before CLIP, empty without a CLIP score."""
        return _steps(self.clip.chain) if self.clip else []

    @property
    def hash(self) -> str:
        """16 hex digits over everything that can change the number."""
        content = asdict(self)
        del content["title"], content["notes"]
        if self.clip is None:
            del content["clip"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def seeds(self, repetition: int) -> range:
        """Seeds of one repetition: consecutive, as EDM numbers them."""
        start = self.first_seed + repetition * self.number
        return range(start, start + self.number)


def _steps(chain: Iterable[ResizeStep]) -> list[Step]:
    return [Step(step.op, step.size) for step in chain]


PAIRED = ("psnr", "consistency", "sharpness", "spread")
"""Metrics of samples that were each made from a picture."""
CHAINS = ("bond-error", "clashes", "gyration", "1-nna", "handedness")
"""Metrics of chains of points in space, samples (n, 3) in nanometres."""
VOXELS = ("holes", "overlap", "1-nna-voxels", "class-accuracy-of-heights")
"""Metrics of solids of voxels, samples (depth, h, w)."""
METRICS = (
    "fd",
    "kid",
    "cmmd",
    "prdc3",
    "prdc5",
    "classifier-score",
    "class-accuracy",
    "diversity",
    "energy",
    "clip-score",
    "retrieval",
    *PAIRED,
    *CHAINS,
    *VOXELS,
)


@dataclass(frozen=True)
class MissingFile:
    """A file a preset needs that was not found, and the places looked at."""

    file: File
    tried: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        places = ", ".join(map(str, self.tried))
        file = self.file
        return f"{file.name}: missing; licence: {file.licence}; from: {file.source}; put it at {places}"


class MissingFiles(FileNotFoundError):
    """A preset cannot run; the message lists every missing file with its licence and place."""


def preset_names() -> list[str]:
    """Names of the presets shipped."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_preset(name_or_path: str | os.PathLike[str]) -> Preset:
    """The shipped preset of that name, or the one in a YAML file.

    Raises:
        FileNotFoundError: neither a shipped name nor a file.
        ValueError: what is wrong with the file, all problems at once.
    """
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        path = FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"preset {name_or_path}: not one of {preset_names()} and not a YAML file")
    try:
        text = text_of(path.read_bytes(), path)
    except ValueError as error:
        raise InputError(str(error)) from None
    try:
        content: dict[str, Any] = yaml.safe_load(text)
        # Strict mode takes mappings for dataclasses only from JSON.
        return TypeAdapter(Preset).validate_json(json.dumps(content, default=str))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({error})") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'preset'}: {e['msg']}" for e in error.errors())
        raise InputError(f"{path}: {problems}") from None


def locate(file: File, kind: str) -> Path:
    """Where `file` is: in $FEWSTEP_WEIGHTS, or the user's cache under `kind`; its sha256 is checked
    when known.

    Raises:
        MissingFiles: nowhere.
        ValueError: there, with another sha256.
    """
    tried = [cache_dir(kind) / file.name]
    if folder := os.environ.get("FEWSTEP_WEIGHTS"):
        tried.insert(0, Path(folder) / file.name)
    for path in tried:
        # A transformers model is a folder; only its reader can check it.
        if path.is_dir():
            return path
        if path.is_file():
            if file.sha256 and not file_sha256(path).startswith(file.sha256):
                raise InputError(f"{path}: sha256 is not the protocol's {file.sha256}; another file")
            return path
    raise MissingFiles(str(MissingFile(file, tried)))


def require_files(
    preset: Preset,
    weights: str | os.PathLike[str] | None = None,
    clip: str | os.PathLike[str] | None = None,
    omit: Collection[str] = (),
) -> dict[str, Path]:
    """Paths of everything the preset needs, keyed ``prompts``, ``reference``, ``weights``, ``clip``.

    `weights` and `clip`, where given, are used for the extractor and for CLIP instead of a search; their readers
    check them. Nothing is needed for metrics in `omit`.

    Raises:
        MissingFiles: one line per missing file, all at once.
    """
    needed = {
        "prompts": preset.conditions.file,
        "reference": preset.reference.file,
        "weights": preset.extractor_file,
    }
    if preset.clip is not None and "clip-score" in preset.metrics and "clip-score" not in omit:
        needed["clip"] = preset.clip.file
    given = {"weights": weights, "clip": clip}
    found: dict[str, Path] = {}
    missing = []
    for kind, file in needed.items():
        if file is None:
            continue
        own = given.get(kind)
        if own is not None:
            found[kind] = Path(own)
            continue
        try:
            found[kind] = locate(file, "weights" if kind == "clip" else kind)
        except MissingFiles as error:
            missing.append(str(error))
    if missing:
        raise MissingFiles(f"preset {preset.name}: " + "\n".join(missing))
    return found


def labels_of(preset: Preset, indices: list[int]) -> list[int]:
    """Class labels by global index; the same for any batch size and number of processes.

    ``labels-random`` hashes the index, so label i is known without drawing those before it.
    """
    classes = preset.conditions.classes
    if not classes:
        raise ValueError(f"preset {preset.name}: its conditions are {preset.conditions.kind!r}, not labels")
    if preset.conditions.kind == "labels-cycle":
        return [index % classes for index in indices]
    return [
        int.from_bytes(hashlib.sha256(f"fewstep-label-{index}".encode()).digest()[:8], "big") % classes
        for index in indices
    ]
