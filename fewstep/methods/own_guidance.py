"""Guidance of a network trained from data by its own fields, with and without the condition: MeanFlow's and iMF's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.condition import differs
from fewstep.algebra.process import bc


def own_guided(
    student: Any,
    batch: Batch,
    cond: Any,
    x: Tensor,
    t: Tensor,
    pair: Tensor,
    *,
    omega: float = 1.0,
    kappa: float = 0.0,
    w: Tensor | None = None,
    until: float = 1.0,
) -> Tensor:
    """The velocity (b, *d) omega pair + (1 - omega - kappa) v(no condition) + kappa v(condition).

    MeanFlow, arXiv 2505.13447, eq. 19; its scale is omega / (1 - kappa). iMF (arXiv 2512.02012) has omega 1 and
    kappa 1 - 1/w, which is the scale w, and tells the student w (b,). Nothing is guided above the time `until`, in rows
    without a condition, or where the batch has none.
    """
    if (w is None and (omega, kappa) == (1.0, 0.0)) or cond is None or batch.null_cond is None:
        return pair
    share: Any = kappa if w is None else 1 - 1 / bc(w, x).to(x.dtype)
    empty = student(x, t, batch.null_cond).velocity()  # at w = 1 where that is an input
    own = student(x, t, cond, **({} if w is None else {"w": w})).velocity()
    guided = omega * pair + (1 - omega - share) * empty + share * own
    # Rows without a condition learn the plain field, which the guided one is built from.
    kept = (t <= until) & differs(cond, batch.null_cond)
    return torch.where(bc(kept.to(t.dtype), x) > 0, guided, pair)
