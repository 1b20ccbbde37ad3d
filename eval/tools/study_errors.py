"""Is the error bar right? Predicted against empirical spread of FD, and the bias against a known truth.

``python -m fewstep.eval.tools.study_errors --features house-digits --samples 300 1000 5000 --sets 100``
``python -m fewstep.eval.tools.study_errors --features effnet-lite0-32 --images 10000 --copies 4 --samples 5000 20000``

A finite pool of generated images stands for the generator, so its distance to the reference is known
exactly; sets are drawn from it with replacement, which makes them independent samples of it.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np
import torch

from fewstep.eval.features.base import FeatureExtractor
from fewstep.eval.features.house import house_digits, house_fashion
from fewstep.eval.features.networks import effnet_lite0
from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.eval.protocol.datasets import digits, fashion_mnist
from fewstep.eval.protocol.resize import resize_tensor
from fewstep.eval.tools.train_house import Plan, augment


@dataclass(frozen=True)
class Row:
    """One sample size: `ratio` is predicted standard error over empirical spread, `first_order` that of
    the plain formula.
    """

    n: int
    sets: int
    truth: float
    mean: float
    spread: float
    ratio: float
    first_order: float
    bias: float
    corrected: float
    corrected_spread: float
    extrapolated: float
    extrapolated_spread: float
    usable: float


def pools(
    name: str, shift: float, noise: float, copies: int, seed: int = 0, count: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Features of the first `count` real images, and of `copies` shifted and noisy versions of each: the
    generator's pool.
    """
    extractor: FeatureExtractor
    if name == "house-digits":
        images, extractor, size = digits()[0], house_digits(), 8
    elif name == "house-fashion-mnist":
        images, extractor, size = fashion_mnist("train")[0].float(), house_fashion(), 28
    elif name == "effnet-lite0-32":
        images, extractor, size = fashion_mnist("train")[0].float(), effnet_lite0(32), 32
    else:
        raise ValueError(f"features: unknown {name!r}")
    images = images[:count]
    network = house_digits().__class__ if size == 8 else house_fashion().__class__
    plan = Plan(network, 1, 1, shift=shift, noise=noise)
    generator = torch.Generator().manual_seed(seed)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape[-1] != size:
            pixels = resize_tensor(pixels, size, "bicubic")
        return extractor(pixels)

    parts = images.split(32)
    real = torch.cat([features(part) for part in parts])
    fake = torch.cat([features(augment(part, plan, generator)) for _ in range(copies) for part in parts])
    return real.double().numpy(), fake.double().numpy()


def extrapolate(features: np.ndarray, reference: FeatureStatistics, generator: np.random.Generator) -> float:
    """FD at infinite N by a line in 1/n through 15 subsets of n/10 ... n (Chong and Forsyth 2020)."""
    sizes = np.linspace(len(features) / 10, len(features), 15).astype(int)
    values = []
    for size in sizes:
        part = FeatureStatistics(features.shape[1])
        part.update(features[generator.choice(len(features), size, replace=False)])
        values.append(frechet_distance(part, reference).value)
    return float(np.polyfit(1 / sizes, values, 1)[1])


def study(real: np.ndarray, pool: np.ndarray, n: int, sets: int, seed: int = 0, compare: bool = True) -> Row:
    """Draw `sets` samples of size `n` and compare what they say about themselves with what they do."""
    reference = FeatureStatistics(real.shape[1])
    reference.update(real)
    whole = FeatureStatistics(pool.shape[1])
    whole.update(pool)
    # The law drawn from is the pool itself, whose covariance divides by its size.
    law = FeatureStatistics.from_moments(whole.mean, whole.covariance * (len(pool) - 1) / len(pool))
    truth = frechet_distance(law, reference).value
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(sets):
        x = pool[generator.integers(0, len(pool), n)]
        result = frechet_distance(x, reference)
        if result.influence is None or result.standard_error is None or result.bias is None:
            raise ValueError(f"samples: {n} is not above the dimension {real.shape[1]}")
        first = float(result.influence.std(ddof=1)) / math.sqrt(n)
        other = extrapolate(x, reference, generator) if compare else math.nan
        found.append((result.value, result.standard_error, first, result.bias, other, result.usable))
    values, errors, firsts, biases, others, usable = np.array(found, dtype=float).T
    spread = float(values.std(ddof=1))
    corrected = values - biases
    return Row(
        n=n,
        sets=sets,
        truth=truth,
        mean=float(values.mean()),
        spread=spread,
        ratio=float(errors.mean()) / spread,
        first_order=float(firsts.mean()) / spread,
        bias=float(biases.mean()),
        corrected=float(corrected.mean()),
        corrected_spread=float(corrected.std(ddof=1)),
        extrapolated=float(others.mean()),
        extrapolated_spread=float(others.std(ddof=1)),
        usable=float(usable.mean()),
    )


def main(arguments: list[str] | None = None) -> None:
    """Print one line of a Markdown table per sample size."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.eval.tools.study_errors", description=__doc__)
    choices = ["house-digits", "house-fashion-mnist", "effnet-lite0-32"]
    parser.add_argument("--features", choices=choices, default="house-digits")
    parser.add_argument("--samples", type=int, nargs="+", default=[300, 1000, 5000])
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--copies", type=int, default=20, help="noisy versions of each image in the pool")
    parser.add_argument("--shift", type=float, default=0.3, help="pixels")
    parser.add_argument("--noise", type=float, default=12.0, help="levels of 255")
    parser.add_argument("--images", type=int, help="real images used; all when left out")
    parser.add_argument("--no-extrapolation", action="store_true", help="leave out the 15-point comparison")
    options = parser.parse_args(arguments)
    real, pool = pools(options.features, options.shift, options.noise, options.copies, count=options.images)
    print(f"{options.features}: {len(real)} real images, pool of {len(pool)}, {options.sets} sets a row")
    print("| N | N/d | truth | FD | b/N | SE / spread | first order | corrected | 15-point | spread ratio | usable |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for n in options.samples:
        row = study(real, pool, n, options.sets, compare=not options.no_extrapolation)
        print(
            f"| {n} | {n / real.shape[1]:.1f} | {row.truth:.4g} | {row.mean:.4g} ± {row.spread:.2g} | {row.bias:.3g} "
            f"| {row.ratio:.2f} | {row.first_order:.2f} | {row.corrected:.4g} ± {row.corrected_spread:.2g} "
            f"| {row.extrapolated:.4g} ± {row.extrapolated_spread:.2g} "
            f"| {row.corrected_spread / row.extrapolated_spread:.2f} | {100 * row.usable:.0f} % |",
            flush=True,
        )
    print(
        "SE / spread: predicted standard error over the sets' standard deviation, itself good to "
        f"{100 / math.sqrt(2 * (options.sets - 1)):.0f} %. Spread ratio: that of the corrected value over that of the "
        "15-point extrapolation, below 1 where the correction is the steadier."
    )


if __name__ == "__main__":
    main()
