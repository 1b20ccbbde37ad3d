"""f-divergences between student and teacher: their weight on a score difference, from a density ratio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["rkl", "fkl", "js", "softened_rkl", "hellinger", "neyman", "jeffreys"]

_H: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "fkl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "hellinger": lambda r: torch.sqrt(r) / 4,
    "neyman": lambda r: 2 / r,
    "jeffreys": lambda r: 1 + r,
}


def divergence_weight(kind: Divergence, ratio: Tensor) -> Tensor:
    """h(r) = r^2 f''(r) of D_f = E_q f(r) at r = p_real / p_fake, so that grad D_f = -E h(r) (s_p - s_q) dx_t.

    f: rkl -log r; fkl r log r; js r log r - (r + 1) log((r + 1) / 2); softened_rkl (r + 1) log((r + 1) / (2 r));
    hellinger 1 - sqrt(r); neyman (1 - r)^2 / r; jeffreys (r - 1) log r (f-distill, arXiv 2502.15681, table 1).
    ratio: positive, of any shape, which the weight has too. Raises ValueError for another kind.

    >>> fewstep.divergence_weight("fkl", torch.tensor([0.5, 2.0]))
    tensor([0.5000, 2.0000])
    >>> fewstep.divergence_weight("kl", torch.ones(1))
    Traceback (most recent call last):
    ValueError: divergence 'kl' is not one of rkl, fkl, js, softened_rkl, hellinger, neyman, jeffreys
    """
    if kind not in _H:
        raise ValueError(f"divergence {kind!r} is not one of {', '.join(_H)}")
    return _H[kind](ratio)


Expanded = Literal["rkl", "fkl", "chi2", "js", "jeffreys"]

_EXPANDED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "rkl": lambda r: (torch.full_like(r, 0.5), torch.ones_like(r)),
    "fkl": lambda r: (torch.ones_like(r), 1 / r),
    "chi2": lambda r: (torch.zeros_like(r), 2 * r),
    "js": lambda r: (1 - 0.5 / (1 + r), 1 / (1 + r)),
    "jeffreys": lambda r: (1 - 0.5 * r / (1 + r), 1 + 1 / r),
}


def expanded_divergence(kind: Expanded, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, weight) with which `inverse_matching` has the gradient of the time-expanded divergence E_p f(q/p).

    With r = p_fake / p_real (b,) and F = r^2 f''(r): alpha = 1 - r F'/(2 F), weight = F / r (Uni-Instruct,
    arXiv 2505.20755). f: rkl r log r; fkl -log r; chi2 (r - 1)^2; js r log r - (r + 1) log((r + 1) / 2);
    jeffreys (r - 1) log r. Both must stay functions of x_t: with the ratio detached the gradient can point
    away from the divergence's. Raises ValueError for another kind.

    >>> alpha, weight = fewstep.expanded_divergence("rkl", torch.tensor([2.0]))  # that of inverse bridge matching
    >>> alpha, weight
    (tensor([0.5000]), tensor([1.]))
    """
    if kind not in _EXPANDED:
        raise ValueError(f"divergence {kind!r} is not one of {', '.join(_EXPANDED)}")
    return _EXPANDED[kind](ratio)
