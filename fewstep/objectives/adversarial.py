"""Adversarial losses on logits of any shape (b, *heads), and R1 in two forms. Logits grow with 'real'."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def logistic_generator(fake: Tensor) -> Tensor:
    """mean softplus(-fake): the non-saturating loss (arXiv 1406.2661)."""
    return F.softplus(-fake).mean()


def logistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean softplus(fake) + mean softplus(-real); at its optimum a logit is log p_real / p_fake."""
    return F.softplus(fake).mean() + F.softplus(-real).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean fake (arXiv 1705.02894)."""
    return -fake.mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def r1_exact(logits: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """mean_b |grad_x sum logits|^2 on real inputs (arXiv 1801.04406), by double backward."""
    real = real.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(logits(real).sum(), real, create_graph=True)
    return (gradient**2).flatten(1).sum(1).mean()


def r1_finite(logits: Callable[[Tensor], Tensor], real: Tensor, noise: Tensor, step: float = 0.1) -> Tensor:
    """mean_b (sum logits(x) - sum logits(x + step n))^2: R1 without double backward (APT, arXiv 2501.08316).

    Heads are summed before squaring, as in `r1_exact`. For n ~ N(0, I) it tends to step^2 times that as step -> 0,
    so its weight is step^-2 times R1's.
    """
    change = logits(real) - logits(real + step * noise)
    return (change.reshape(len(change), -1).sum(1) ** 2).mean()
