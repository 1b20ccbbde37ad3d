"""Generation for evaluation: shards over global sample indices, resumable, the same for any number of
processes.

The seam to a model is one callable, ``generate(indices) -> (len(indices), C, H, W)`` in [-1, 1], whose
sample i depends on the global index i alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.config import UserError
from fewstep.eval.errors import InputError
from fewstep.eval.features.base import FeatureExtractor, rows_at_once
from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.eval.protocol.resize import CHAINED, Step, apply_chain, quantise
from fewstep.files import atomic_path, file_sha256, read_json

Generate = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Job:
    """What is generated; all of it is compared before shards are taken up again.

    Attributes:
        number: samples, with global indices 0..number-1.
        identity: anything JSON that identifies the model, its settings and the preset (hashes).
        shard_size: samples per shard file.
        batch_size: samples per call of `generate`; must not change the samples, so it may differ on resume.
        quantiser, chain: from the preset; a quantiser of None leaves vectors, points and solids as they are.
        keep_images: store the quantised pixels beside the features.
        clip_chain: from the preset, before CLIP, where a CLIP score is asked for.
    """

    number: int
    identity: Mapping[str, Any]
    shard_size: int = 500
    batch_size: int = 100
    quantiser: str | None = "round"
    chain: Sequence[Step] = ()
    keep_images: bool = False
    clip_chain: Sequence[Step] = ()

    def __post_init__(self) -> None:
        for name in ("number", "shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def shards(self) -> list[range]:
        """Index range of every shard."""
        starts = range(0, self.number, self.shard_size)
        return [range(start, min(start + self.shard_size, self.number)) for start in starts]

    def key(self, extractor: FeatureExtractor, clip: FeatureExtractor | None = None) -> str:
        """SHA-256 over all that decides a shard's content."""
        content: dict[str, Any] = {
            "identity": dict(self.identity),
            "number": self.number,
            "shard_size": self.shard_size,
            "quantiser": self.quantiser,
            "chain": [[step.op, step.size] for step in self.chain],
            "keep_images": self.keep_images,
            "extractor": [extractor.name, extractor.sha256],
        }
        if clip is not None:
            content["clip"] = [clip.name, clip.sha256, [[step.op, step.size] for step in self.clip_chain]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass
class Samples:
    """Everything kept of the generated set, in the order of the indices.

    `features` (N, D) fp32, `logits` (N, K) where the extractor has a classifier, `statistics` fp64;
    `clip` (N, D) are CLIP's image features where they were asked for; `shards` are the files; `pixels` are there where
    samples were kept without files.
    """

    features: Tensor
    logits: Tensor | None
    statistics: FeatureStatistics
    shards: list[Path] = field(default_factory=list)
    clip: Tensor | None = None
    pixels: Tensor | None = None

    def images(self) -> Iterator[Tensor]:
        """Quantised pixels shard by shard; raises ValueError when they were not kept."""
        if self.pixels is not None:
            yield self.pixels
        elif not self.shards:
            raise ValueError("images were not kept; generate with keep_images=True")
        for path in self.shards:
            with safe_open(path, framework="pt") as archive:
                if "images" not in archive.keys():  # noqa: SIM118
                    raise ValueError(f"{path}: images were not kept; generate with keep_images=True")
                yield archive.get_tensor("images")


def shard_size(number: int) -> int:
    """Small enough that several processes share a small set, the same for any number of them, whole batches of 2^k."""
    return min(512, 1 << (-(-number // 8) - 1).bit_length())


def make_samples(
    job: Job, generate: Generate, extractor: FeatureExtractor, clip: FeatureExtractor | None = None
) -> Samples:
    """All samples of a job by this process, nothing on the disk; raises as `run_shards`."""
    parts: dict[str, list[Tensor]] = {"features": [], "logits": [], "clip": [], "images": []}
    for indices in job.shards:
        for name, value in _make_shard(job, list(indices), generate, extractor, None, clip).items():
            parts[name].append(value)
    pixels = parts.pop("images")
    samples = _samples(parts, [], extractor)
    samples.pixels = torch.cat(pixels) if pixels else None
    return samples


def run_shards(
    job: Job,
    folder: str | Path,
    generate: Generate,
    extractor: FeatureExtractor,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[..., None] | None = None,
    clip: FeatureExtractor | None = None,
) -> int:
    """Make the shards of this rank that are not there yet; returns how many samples were generated.

    Rank r of w makes shards r, r + w, ...; a finished shard is a data file and, written last, a JSON with its
    checksum. Interrupted at any moment, the next call makes only what is missing. `progress` is called with the number of
    samples made, and with those of a shard that is there and kept=True.

    Raises:
        ValueError: the folder holds shards of another job, or `generate` returns what is not asked for.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0..{world_size - 1}, got {rank}")
    folder = Path(folder)
    key = _claim(folder, job, extractor, clip)
    made = 0
    for number, indices in enumerate(job.shards):
        if number % world_size != rank:
            continue
        if _is_done(folder, number, key):
            if progress:
                progress(len(indices), kept=True)
            continue
        tensors = _make_shard(job, list(indices), generate, extractor, progress, clip)
        data, note = _paths(folder, number)
        with atomic_path(data) as temporary:
            save_file(tensors, temporary, metadata={"key": key})
        with atomic_path(note) as temporary:
            content = {"key": key, "start": indices.start, "stop": indices.stop, "sha256": file_sha256(data)}
            temporary.write_text(json.dumps(content))
        made += len(indices)
    return made


def collect(job: Job, folder: str | Path, extractor: FeatureExtractor, clip: FeatureExtractor | None = None) -> Samples:
    """Gather all shards of `job` after every rank is done.

    Raises:
        ValueError: shards missing, damaged or of another job; each is named.
    """
    folder = Path(folder)
    key = _claim(folder, job, extractor, clip)
    absent = [number for number in range(len(job.shards)) if not _is_done(folder, number, key)]
    if absent:
        names = [_paths(folder, number)[0].name for number in absent[:5]]
        raise ValueError(f"{folder}: {len(absent)} of {len(job.shards)} shards missing or damaged: {', '.join(names)}")
    parts: dict[str, list[Tensor]] = {"features": [], "logits": [], "clip": []}
    paths = []
    for number in range(len(job.shards)):
        path = _paths(folder, number)[0]
        with safe_open(path, framework="pt") as archive:
            for name in parts.keys() & set(archive.keys()):
                parts[name].append(archive.get_tensor(name))
        paths.append(path)
    return _samples(parts, paths, extractor)


def extract_images(
    batches: Iterator[Tensor],
    extractor: FeatureExtractor,
    chain: Sequence[Step] = (),
    clip: FeatureExtractor | None = None,
    clip_chain: Sequence[Step] = (),
) -> Samples:
    """Samples from ready pixels (uint8 (N, C, H, W) batches), such as those of an `ImageFolder`."""
    parts: dict[str, list[Tensor]] = {"features": [], "logits": [], "clip": []}
    for batch in batches:
        found = _chained(extractor, batch, chain)
        if clip is not None:
            found["clip"] = _chained(clip, batch, clip_chain)["features"]
        for name, value in found.items():
            parts[name].append(value)
    if not parts["features"]:
        raise ValueError("images: none were given")
    return _samples(parts, [], extractor)


def _samples(parts: Mapping[str, list[Tensor]], paths: list[Path], extractor: FeatureExtractor) -> Samples:
    statistics = FeatureStatistics(parts["features"][0].shape[1], {"extractor": extractor.name})
    for part in parts["features"]:
        statistics.update(part)
    features, logits, clip = (torch.cat(v) if v else None for v in parts.values())
    assert features is not None
    return Samples(features, logits, statistics, paths, clip)


def _make_shard(
    job: Job,
    indices: list[int],
    generate: Generate,
    extractor: FeatureExtractor,
    progress: Callable[[int], None] | None,
    clip: FeatureExtractor | None,
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(indices), job.batch_size):
        wanted = indices[start : start + job.batch_size]
        with torch.no_grad():
            images = generate(wanted)
        as_they_are = job.quantiser is None
        expected = "(N, ...)" if as_they_are else "(N, C, H, W)"
        right = images.ndim >= 2 if as_they_are else images.ndim == 4
        if not right or len(images) != len(wanted):
            raise ValueError(
                f"generate: returned shape {tuple(images.shape)} for {len(wanted)} indices, expected {expected}"
            )
        try:
            pixels = quantise(images, job.quantiser)
        except InputError as error:
            raise InputError(f"generate: samples {wanted[0]}..{wanted[-1]}: {error}") from None
        found = _chained(extractor, pixels.flatten(1) if as_they_are else pixels, job.chain)
        if clip is not None:
            found["clip"] = _chained(clip, pixels, job.clip_chain)["features"]
        for name, network in (("features", extractor), ("clip", clip)):
            if network is not None and not torch.isfinite(found[name]).all():
                raise InputError(f"{network.name}: NaN features for samples {wanted[0]}..{wanted[-1]}")
        if job.keep_images:
            found["images"] = pixels.cpu()
        for name, value in found.items():
            parts.setdefault(name, []).append(value)
        if progress:
            progress(len(wanted))
    return {name: torch.cat(values).contiguous() for name, values in parts.items()}


def _chained(extractor: FeatureExtractor, pixels: Tensor, chain: Sequence[Step]) -> dict[str, Tensor]:
    """Features behind a resize chain, a few images at a time: enlarged ones are large."""
    if not chain:
        return _features(extractor, pixels)
    parts = [_features(extractor, apply_chain(part, chain)) for part in pixels.split(CHAINED)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _features(extractor: FeatureExtractor, pixels: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        chunks = pixels.split(rows_at_once(extractor, pixels))
        features = torch.cat([extractor(chunk) for chunk in chunks])
        found = {"features": features.float().cpu()}
        if from_features := getattr(extractor, "from_features", None):
            found["logits"] = from_features(features).float().cpu()
    return found


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"shard-{number:05d}.safetensors", folder / f"shard-{number:05d}.json"


def _claim(folder: Path, job: Job, extractor: FeatureExtractor, clip: FeatureExtractor | None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    key = job.key(extractor, clip)
    stamp = folder / "job.json"
    content = {"key": key, "identity": dict(job.identity), "extractor": extractor.name, "number": job.number}
    if not stamp.is_file():
        with atomic_path(stamp) as temporary:
            temporary.write_text(json.dumps(content, sort_keys=True, indent=1))
    try:
        found = read_json(stamp)
    except UserError as error:
        raise InputError(f"{error}; delete {folder}") from None
    if found.get("key") != key:
        differing = sorted(name for name in content if found.get(name) != content[name] and name != "key")
        raise InputError(
            f"{folder}: holds shards of another job (differs in {differing or ['settings']}); give another folder"
        )
    return key


def _is_done(folder: Path, number: int, key: str) -> bool:
    data, note = _paths(folder, number)
    try:
        content = read_json(note)
        return content["key"] == key and file_sha256(data) == content["sha256"]
    except (OSError, UserError, KeyError):
        return False
