"""Checks that the harness measures what it says, on the machine at hand: ``fewstep eval --selftest``."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.eval.features.base import FeatureExtractor, random_conv
from fewstep.eval.features.house import house_digits
from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.eval.protocol.datasets import digits
from fewstep.eval.protocol.reference import Reference, digits_reference
from fewstep.eval.protocol.resize import QUANTISERS, resize_pil, resize_tensor
from fewstep.eval.protocol.runner import Job, collect, run_shards


@dataclass(frozen=True)
class Check:
    """One line of the self-test: what was compared, the deviation found, the largest allowed."""

    name: str
    deviation: float
    allowed: float
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """Whether the deviation is allowed; a skipped check has not passed."""
        return not self.skipped and self.deviation <= self.allowed


@dataclass(frozen=True)
class Sensitivity:
    """How much one careless step moves FD: the same images before and after it, against the digits reference."""

    step: str
    value: float
    change: float


def selftest() -> tuple[list[Check], list[Sensitivity]]:
    """Run every check and the sensitivity table; about ten seconds on two cores, no network."""
    checks = [_known_gaussians(), _rank_deficient(), *_against_cleanfid(), _resize(), _world_size()]
    return checks, sensitivity(house_digits(), digits_reference(house_digits()))


def _known_gaussians() -> Check:
    generator = np.random.default_rng(0)
    worst = 0.0
    for dim in (3, 64, 256):
        basis = np.linalg.qr(generator.normal(size=(dim, dim)))[0]
        a, b = generator.uniform(0.1, 3, dim), generator.uniform(0.1, 3, dim)
        shift = generator.normal(size=dim)
        sample = FeatureStatistics.from_moments(shift, basis * a @ basis.T)
        reference = FeatureStatistics.from_moments(np.zeros(dim), basis * b @ basis.T)
        expected = shift @ shift + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
        worst = max(worst, abs(frechet_distance(sample, reference).value / expected - 1))
    return Check("Gaussians with commuting covariances against the closed form", worst, 1e-10)


def _rank_deficient() -> Check:
    generator = np.random.default_rng(1)
    u, v = generator.normal(size=(2, 300))
    x = np.stack([u, -u])
    reference = FeatureStatistics.from_moments(np.zeros(300), np.outer(v, v))
    # Two points have covariance 2 u u^T: tr (2 u u^T v v^T)^(1/2) = sqrt 2 |u.v|.
    expected = 2 * u @ u + v @ v - 2 * np.sqrt(2) * abs(u @ v)
    deviation = abs(frechet_distance(x, reference).value / expected - 1)
    return Check("two samples in 300 dimensions against the closed form", deviation, 1e-10)


def _against_cleanfid() -> list[Check]:
    names = ("clean-fid's frechet_distance, same moments", "clean-fid's folder path, shared extractor")
    if find_spec("cleanfid") is None:
        return [Check(name, np.nan, 0.0, "clean-fid is not installed") for name in names]
    from cleanfid import fid

    try:
        fid.frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2))
    except TypeError:
        return [Check(name, np.nan, 0.0, "clean-fid's own code needs scipy < 1.18") for name in names]
    generator = np.random.default_rng(2)
    x, y = (generator.normal(size=(600, 128)) @ generator.normal(size=(128, 128)) / 11 for _ in range(2))
    theirs = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    reference = FeatureStatistics(128)
    reference.update(y)
    moments = Check(names[0], abs(frechet_distance(x, reference).value / theirs - 1), 1e-6)
    return [moments, _folder_check(names[1], fid)]


def _folder_check(name: str, fid: object) -> Check:
    from fewstep.eval.protocol.images import ImageFolder, save_image
    from fewstep.eval.protocol.resize import Step
    from fewstep.eval.protocol.runner import extract_images

    extractor = random_conv(0, dim=6)
    generator = torch.Generator().manual_seed(3)
    with tempfile.TemporaryDirectory() as root:
        folders = []
        for part in range(2):
            folder = Path(root) / str(part)
            base = torch.rand(16, 3, 4, 4, generator=generator) * (200 + 50 * part)
            for index, image in enumerate(resize_tensor(base, 24, "bicubic").round().to(torch.uint8)):
                save_image(image, folder / f"{index:03d}.png")
            folders.append(folder)
        theirs = fid.compute_fid(  # type: ignore[attr-defined]
            *map(str, folders),
            num_workers=0,
            device=torch.device("cpu"),
            use_dataparallel=False,
            verbose=False,
            custom_feat_extractor=extractor,
        )
        ours = [
            extract_images(ImageFolder(folder).batches(20), extractor, [Step("pil-bicubic", 299)]) for folder in folders
        ]
        value = frechet_distance(ours[0].features, ours[1].statistics).value
    return Check(name, abs(value / theirs - 1), 1e-6)


def _resize() -> Check:
    generator = torch.Generator().manual_seed(4)
    worst = 0.0
    for size in (32, 64, 257):
        images = torch.randint(0, 256, (2, 3, size, size), generator=generator, dtype=torch.uint8)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        ours = resize_tensor(images.to(device), 299, "bicubic").cpu()
        worst = max(worst, float((ours - resize_pil(images, 299, "bicubic")).abs().max()))
    return Check("device resize against Pillow's float bicubic, levels of 255", worst, 0.01)


def _world_size() -> Check:
    """Features of one process and of three, with other batch sizes: the largest difference."""

    def generate(indices: list[int]) -> Tensor:
        rows = [torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(index)) for index in indices]
        return torch.stack(rows).tanh()

    extractor = random_conv(1, dim=8)
    found = []
    with tempfile.TemporaryDirectory() as root:
        for world_size, batch_size in ((1, 7), (3, 4)):
            job = Job(50, {"world": "any"}, shard_size=9, batch_size=batch_size)
            folder = Path(root) / str(world_size)
            for rank in range(world_size):
                run_shards(job, folder, generate, extractor, rank=rank, world_size=world_size)
            found.append(collect(job, folder, extractor).features)
    return Check("features from 1 process and from 3", float((found[0] - found[1]).abs().max()), 1e-5)


def sensitivity(extractor: FeatureExtractor, reference: Reference) -> list[Sensitivity]:
    """FD of the reference's own images (digits, 8x8) after one careless step each."""
    pixels = digits()[0].round().to(torch.uint8)

    def jpeg(quality: int) -> Tensor:
        out = []
        for image in pixels:
            buffer = io.BytesIO()
            Image.fromarray(image[0].numpy()).save(buffer, "jpeg", quality=quality)
            buffer.seek(0)
            out.append(torch.from_numpy(np.array(Image.open(buffer))))
        return torch.stack(out).unsqueeze(1)

    signed = pixels.float() / 127.5 - 1
    twice = resize_pil(pixels, 16, "bicubic", rounded=True)
    steps: dict[str, Callable[[], Tensor]] = {
        "none (8-bit pixels)": lambda: pixels,
        "JPEG quality 95": lambda: jpeg(95),
        "JPEG quality 75": lambda: jpeg(75),
        "up to 16 and back, bicubic with antialias": lambda: resize_tensor(twice, 8, "bicubic"),
        "up to 16 and back, bilinear without antialias": lambda: resize_tensor(twice, 8, "bilinear", False),
        "up to 16 and back, nearest": lambda: twice[..., ::2, ::2],
    }
    for rule, function in QUANTISERS.items():
        # Half a level of offset stands for a generator, whose values do not sit on the grid.
        steps[f"quantiser {rule}, values off the grid"] = lambda f=function: f(signed + 0.5 / 127.5)
    rows: list[Sensitivity] = []
    for name, make in steps.items():
        with torch.no_grad():
            value = frechet_distance(extractor(make()), reference.statistics).value
        rows.append(Sensitivity(name, value, value - (rows[0].value if rows else value)))
    return rows


def main() -> int:
    """Print both tables; the exit status is 1 when a check fails."""
    checks, rows = selftest()
    for check in checks:
        state = f"skipped: {check.skipped}" if check.skipped else ("ok" if check.passed else "FAILED")
        print(f"{check.name}: {check.deviation:.2g} (allowed {check.allowed:.2g}) {state}")
    for row in rows:
        print(f"FD after {row.step}: {row.value:.4g} ({row.change:+.4g})")
    return int(any(not check.passed and not check.skipped for check in checks))


if __name__ == "__main__":
    raise SystemExit(main())
