"""Score differences: the gradient of distribution matching and how it reaches the student."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import Process, bc


def score_difference(fake: Prediction, real: Prediction) -> Tensor:
    """D_fake - D_real at one x_t, (b, *d).

    Times alpha^2/sigma^2 it is d KL(q_t || p_t) / dx0 (DMD, arXiv 2311.18828, eq. 7).

    >>> t, x = torch.tensor([0.5]), torch.tensor([[1.0]])
    >>> real = fewstep.from_raw(fewstep.Flow(), "x0", x, t, torch.tensor([[0.8]]))
    >>> fake = fewstep.from_raw(fewstep.Flow(), "x0", x, t, torch.tensor([[0.5]]))
    >>> fewstep.score_difference(fake, real)  # descending it moves a sample toward D_real
    tensor([[-0.3000]])
    """
    return fake.x0 - real.x0


def dmd_normalizer(x: Tensor, real: Tensor, floor: float = 1e-6) -> Tensor:
    """1 / <|x - D_real|>, the per-sample mean over all other axes, shape (b, 1, ...) (DMD, eq. 8).

    x, real: the clean student sample and the teacher's x0 for it, (b, *d). Never over the batch: one bad sample would
    then set the step of all. `floor` keeps it finite at x = D_real.

    >>> fewstep.dmd_normalizer(torch.tensor([[1.0, 3.0]]), real=torch.tensor([[0.0, 0.0]]))
    tensor([[0.5000]])
    """
    spread = (x - real).abs().flatten(1).mean(1).clamp_min(floor)
    return (1 / spread).reshape(-1, *(1,) * (x.ndim - 1))


def surrogate_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient with respect to x is gradient / numel(x); its value is mean(gradient^2) / 2.

    x, gradient: of one shape, (b, *d); the gradient is detached (DMD, eq. 7: it is known, its loss is not).

    DMD2's public training code sets non-finite entries to 0; here they stay, so that the trainer refuses the
    update and counts it instead of stepping on momentum alone.

    >>> x = torch.zeros(2, requires_grad=True)
    >>> fewstep.surrogate_loss(x, torch.tensor([1.0, -3.0])).backward()
    >>> x.grad
    tensor([ 0.5000, -1.5000])
    """
    return 0.5 * ((x - (x - gradient.detach()).detach()) ** 2).mean()


ScoreWeight = Literal["dmd", "kl", "sigma2", "eps", "one"]


def score_weight(kind: ScoreWeight, process: Process, t: Tensor, x: Tensor, real: Tensor) -> Tensor:
    """Weight (b, 1, ...) of D_fake - D_real for a student sample x noised to t (b,).

    dmd: 1 / <|x - D_real|> (DMD, eq. 8). kl: alpha^2/sigma^2, which makes it d KL(q_t || p_t) / dx (Diff-Instruct,
    arXiv 2305.18455). sigma2: alpha sigma, SwiftBrush's sigma^2 (eps_T - eps_F) (arXiv 2312.05239). eps:
    alpha/sigma, eps_T - eps_F. one: 1.

    >>> x, real, t = torch.tensor([[1.0]]), torch.tensor([[0.5]]), torch.tensor([0.25])
    >>> fewstep.score_weight("dmd", fewstep.Flow(), t, x, real), fewstep.score_weight("kl", fewstep.Flow(), t, x, real)
    (tensor([[2.]]), tensor([[9.]]))
    """
    if kind == "dmd":
        return dmd_normalizer(x, real)
    alpha, sigma = bc(process.alpha(t), x), bc(process.sigma(t), x)
    if kind == "kl":
        return alpha**2 / sigma**2
    if kind == "sigma2":
        return alpha * sigma
    if kind == "eps":
        return alpha / sigma
    if kind == "one":
        return torch.ones_like(alpha)
    raise ValueError(f"weight {kind!r} is not one of {', '.join(get_args(ScoreWeight))}")
