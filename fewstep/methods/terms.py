"""What several methods share: a fresh noise level, dropped conditions, distances of samples."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.condition import replaced
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import bc
from fewstep.algebra.times import law_at
from fewstep.networks.roles import Roles
from fewstep.objectives.trajectory import distance


def noised(times: Any, roles: Roles, batch: Batch, x: Tensor, **where: Any) -> tuple[Tensor, Tensor]:
    """(x_tau, tau): x at a fresh level of `times` with fresh noise; `where` goes to times.sample."""
    process: Any = roles.student.process
    tau = law_at(times, batch.step).sample(batch.draws, process, **where)
    return add_noise(process, x, batch.noise(), tau)[0], tau


def dropped(batch: Batch, probability: float) -> Any:
    """The batch's condition with the null one in place of a random share of rows."""
    if probability == 0 or batch.cond is None or batch.null_cond is None:
        return batch.cond
    return replaced(batch.cond, batch.draws.uniform() < probability, batch.null_cond)


Apart = Literal["mse", "l1", "huber", "huber_sample", "lpips"]
"""A distance of trajectory methods, or LPIPS by the frozen role `perceptual`."""


def apart(roles: Roles, a: Tensor, b: Tensor, kind: Apart, c: float = 1e-3, weight: Tensor | None = None) -> Tensor:
    """The batch mean of weight (b,) times a distance of samples a and b (b, *d), a scalar."""
    if kind != "lpips":
        return distance(a, b, kind, c, weight)
    value = roles.perceptual(a, b)
    return (value if weight is None else value * weight.to(value.dtype)).mean()


def perceptual(kind: Any) -> set[str]:
    """The roles that a distance needs."""
    return {"perceptual"} if kind == "lpips" else set()


def scaled(c: Tensor, x: Tensor) -> Tensor:
    """c (b,) times x (b, *d)."""
    return bc(c, x) * x
