"""Inverse matching: SiD, SIM, inverse bridge matching and the expanded f-divergences as one loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.algebra.prediction import Prediction
from fewstep.objectives.regression import per_sample


def inverse_matching(
    real: Prediction,
    fake: Prediction,
    x: Tensor,
    *,
    alpha: float | Tensor = 0.5,
    ratio: float | Tensor = 1.0,
    huber: float | None = None,
    fill: Tensor | None = None,
) -> Tensor:
    """ratio * phi * ( <D_real - D_fake, D_real - x> - alpha |D_real - D_fake|^2 ), per-sample means, shape (b,).

    Nothing is detached: gradients flow through x and through both denoisers to x_t. Minimised over the student
    with the critic at its optimum, its gradient is half that of the Fisher divergence |D_real - D_fake|^2 for
    alpha = 1/2 (inverse bridge matching, arXiv 2502.01362, up to the factor 2), that of score implicit matching
    for alpha = 1 (SIM, arXiv 2410.16794) and SiD's for any alpha (arXiv 2404.04057).

    Args:
        real, fake: the teacher's and the critic's answers at the same noised student sample, (b, *d).
        x: the clean student sample (b, *d).
        alpha, ratio: numbers or tensors (b,); a tensor is differentiated through x_t as well, which the
            divergences of Uni-Instruct need.
        huber: c of SIM's pseudo-Huber distance, phi = 1 / sqrt(|D_real - D_fake|^2 + c^2), on the mean over
            elements (c of a norm over d elements divided by sqrt(d)); None for the squared distance, phi = 1.
        fill: (b,) on the means, of samples that are zero in part (`fewstep.algebra.points.fill_of`).

    >>> t, x = torch.tensor([0.5]), torch.tensor([[1.0]])
    >>> real = fewstep.from_raw(fewstep.Flow(), "x0", x, t, torch.tensor([[0.8]]))
    >>> fake = fewstep.from_raw(fewstep.Flow(), "x0", x, t, torch.tensor([[0.5]]))
    >>> fewstep.inverse_matching(real, fake, x, alpha=1.0)  # .3 (.8 - 1) - .3^2
    tensor([-0.1500])
    """
    gap = real.x0 - fake.x0
    squared, along = per_sample(gap**2), per_sample(gap * (real.x0 - x))
    if fill is not None:
        squared, along = squared * fill.to(squared), along * fill.to(squared)
    value = along - alpha * squared
    if huber is not None:
        value = value / torch.sqrt(squared + huber**2)
    return ratio * value
