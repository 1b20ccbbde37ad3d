"""Samples against the picture that each was made from: how near, how consistent, how sharp, how varied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.eval.metrics.estimate import Estimate


@dataclass(frozen=True, kw_only=True)
class Paired:
    """What samples (N, C, H, W) in [-1, 1] are compared with, row by row.

    Attributes:
        truth: (N, C, H, W) in [-1, 1]; labels: their classes (N,), None where they have none.
        given: (N, c, h, w), what the samples were made from: operator(truth), with the data's noise where it has any.
        operator: A, of pictures in [-1, 1].
    """

    truth: Tensor
    given: Tensor
    operator: Callable[[Tensor], Tensor]
    labels: Tensor | None = None


def psnr(x: Tensor, truth: Tensor) -> Estimate:
    """Mean peak signal-to-noise ratio in dB of pictures (N, ...) in [-1, 1]: 10 log10(4 / mean squared error) of each.

    Of a sample it is below that of a posterior mean by construction: the mean errs least, and is no sample.
    """
    error = (x - truth).double().square().flatten(1).mean(1).clamp_min(1e-12)
    return _mean(10 * torch.log10(4 / error))


def consistency(x: Tensor, paired: Paired) -> Estimate:
    """Mean |A(x) - given|; noise of the data stays in it."""
    return _mean((paired.operator(x) - paired.given).double().abs().flatten(1).mean(1))


def sharpness(x: Tensor) -> Estimate:
    """Mean |difference| of neighbours in a row plus that in a column; less than the data's is blurred."""
    across, down = (x.double().diff(dim=d).abs().flatten(1).mean(1) for d in (-1, -2))
    return _mean(across + down)


def spread(sets: Sequence[Tensor]) -> Estimate:
    """Mean over pixels of the standard deviation over sets (N, C, H, W) of samples from the same conditions.

    Raises:
        ValueError: fewer than two sets.
    """
    if len(sets) < 2:
        raise ValueError(f"spread: needs two or more samples of each condition (repetitions), not {len(sets)}")
    return _mean(torch.stack(list(sets)).double().std(0).flatten(1).mean(1))


def _mean(values: Tensor) -> Estimate:
    n = len(values)
    error = float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(value=float(values.mean()), standard_error=error, n=n)
