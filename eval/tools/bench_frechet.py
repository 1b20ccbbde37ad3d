"""Speed of one Frechet distance against clean-fid's, same statistics: ``python -m fewstep.eval.tools.bench_frechet``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.metrics.statistics import FeatureStatistics


def timed(function: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Best wall time of `repeats` calls in seconds, and the last value."""
    best, value = float("inf"), float("nan")
    for _ in range(repeats):
        start = time.perf_counter()
        value = function()
        best = min(best, time.perf_counter() - start)
    return best, value


def main(arguments: list[str] | None = None) -> None:
    """Time both on full-rank synthetic features and print one line per case."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.eval.tools.bench_frechet", description=__doc__)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    from cleanfid.fid import frechet_distance as cleanfid_distance

    generator = np.random.default_rng(0)
    sides = []
    for _ in range(2):
        mixing = generator.normal(size=(options.dim, options.dim)) / options.dim**0.5
        stats = FeatureStatistics(options.dim)
        stats.update(np.abs(generator.normal(size=(options.samples, options.dim)) @ mixing))
        sides.append(stats)
    sample, reference = sides
    moments = (sample.mean, sample.covariance, reference.mean, reference.covariance)
    theirs, expected = timed(lambda: float(cleanfid_distance(*moments)), 1)

    def fresh() -> float:
        again = FeatureStatistics.from_moments(reference.mean, reference.covariance, reference.n)
        return frechet_distance(sample, again).value

    first, _ = timed(fresh, options.repeats)
    _ = reference.root
    cached, value = timed(lambda: frechet_distance(sample, reference).value, options.repeats)
    print(f"d = {options.dim}, N = {options.samples}: clean-fid {theirs:.2f} s")
    print(f"ours, reference root cached: {cached:.2f} s, {theirs / cached:.1f} times faster")
    print(f"ours, root computed too: {first:.2f} s, {theirs / first:.1f} times faster")
    print(f"relative difference {abs(value / expected - 1):.1e}")


if __name__ == "__main__":
    main()
