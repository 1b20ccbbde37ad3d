"""Adversarial losses on logits of any shape (b, *heads), and R1 in two forms. Logits grow with 'real'."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def logistic_generator(fake: Tensor) -> Tensor:
    """mean softplus(-fake) over logits of any shape: the non-saturating loss (arXiv 1406.2661); a scalar.

    >>> fewstep.logistic_generator(torch.tensor([[0.0]]))  # log 2 where the discriminator cannot tell
    tensor(0.6931)
    """
    return F.softplus(-fake).mean()


def logistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean softplus(fake) + mean softplus(-real) over logits of any shape (arXiv 1406.2661); a scalar.

    At its optimum a logit is log p_real / p_fake.

    >>> fewstep.logistic_discriminator(real=torch.tensor([[0.0]]), fake=torch.tensor([[0.0]]))
    tensor(1.3863)
    """
    return F.softplus(fake).mean() + F.softplus(-real).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean fake over logits of any shape (arXiv 1705.02894); a scalar.

    >>> fewstep.hinge_generator(torch.tensor([[2.0], [-1.0]]))
    tensor(-0.5000)
    """
    return -fake.mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2 over logits of any shape (arXiv 1705.02894); a scalar.

    >>> fewstep.hinge_discriminator(real=torch.tensor([[2.0]]), fake=torch.tensor([[0.0]]))
    tensor(0.5000)
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def r1_exact(logits: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """mean_b |grad_x sum logits|^2 on real inputs (b, *d) (arXiv 1801.04406), by double backward; a scalar.

    logits: (b, *d) -> (b, ...), row by row; heads are summed before the gradient is taken.

    >>> real = torch.ones(4, 3)
    >>> fewstep.r1_exact(lambda x: 2 * x.sum(1), real).item()  # |(2, 2, 2)|^2
    12.0
    """
    real = real.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(logits(real).sum(), real, create_graph=True)
    return (gradient**2).flatten(1).sum(1).mean()


def r1_finite(logits: Callable[[Tensor], Tensor], real: Tensor, noise: Tensor, step: float = 0.1) -> Tensor:
    """mean_b (sum logits(x) - sum logits(x + step n))^2: R1 without double backward (APT, arXiv 2501.08316).

    real and noise (b, *d); logits: (b, *d) -> (b, ...). Heads are summed before squaring, as in `r1_exact`. For
    n ~ N(0, I) it tends to step^2 times that as step -> 0, so its weight is step^-2 times R1's.

    >>> real, noise = torch.ones(1, 1), torch.ones(1, 1)
    >>> round(fewstep.r1_finite(lambda x: 2 * x, real, noise, step=0.1).item(), 4)  # step^2 |grad|^2
    0.04
    """
    change = logits(real) - logits(real + step * noise)
    return (change.reshape(len(change), -1).sum(1) ** 2).mean()
