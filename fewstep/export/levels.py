"""Schedule lint: training, evaluation and the exported scheduler must stand at the same noise levels.

A student is trained at a few levels and answers well at those alone. Samples go wrong without any error when the
scheduler at inference visits others, so the three lists are compared before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.process import EDM, Process
from fewstep.config import UserError
from fewstep.export.base import Stock
from fewstep.networks.scheduler import EDM_FAMILY

TOLERANCE = 1e-6
"""Largest difference of alpha and sigma; relative where sigma is above 1."""


def is_even(steps: Sequence[float], top: float = 1.0) -> bool:
    """Whether levels part [0, top] into equal pieces."""
    return all(abs(u / top - (1 - i / len(steps))) < 1e-9 for i, u in enumerate(steps))


@dataclass(frozen=True)
class Levels:
    """Noise levels from the first call to the last: x_t = alpha x0 + sigma eps, float64 (n,)."""

    alpha: Tensor
    sigma: Tensor

    def differ(self, other: Levels) -> float:
        """The largest difference, infinite for other numbers of steps; NaN counts as infinite."""
        if self.alpha.shape != other.alpha.shape:
            return float("inf")
        scale = torch.maximum(self.sigma, other.sigma).clamp_min(1)
        gaps = torch.cat(((self.alpha - other.alpha).abs(), (self.sigma - other.sigma).abs() / scale))
        return float(gaps.nan_to_num(nan=float("inf")).max()) if gaps.numel() else 0.0

    def shown(self) -> str:
        """sigma / alpha, the level whatever the process."""
        return ", ".join(self.each())

    def each(self) -> list[str]:
        """sigma / alpha of every level in words."""
        ratios = (self.sigma / self.alpha).tolist()
        return ["pure noise" if math.isinf(r) else f"{r:.8g}" for r in ratios]

    def shares(self) -> tuple[float, ...]:
        """sigma / (alpha + sigma): the level in (0, 1] whatever the process, as an export's note has it."""
        return tuple((self.sigma / (self.alpha + self.sigma)).tolist())


def levels_of(process: Process, steps: Sequence[float]) -> Levels:
    """Levels of u in (0, 1] on a process's grid."""
    t = process.grid(torch.tensor(list(steps), dtype=torch.float64))
    return Levels(process.alpha(t), process.sigma(t))


def levels_of_scheduler(scheduler: Any, **arguments: Any) -> Levels:
    """Levels that a diffusers scheduler visits for the arguments of `set_timesteps`."""
    scheduler.set_timesteps(**arguments)
    return levels_set(scheduler)


def levels_set(scheduler: Any) -> Levels:
    """Levels that a diffusers scheduler visits as it stands, after its `set_timesteps`."""
    stamps = scheduler.timesteps
    name = type(scheduler).__name__
    if name == "SCMScheduler":
        t = stamps[:-1].double()
        return Levels(torch.cos(t), torch.sin(t))
    if name in ("CMStochasticIterativeScheduler", *EDM_FAMILY):
        sigma = scheduler.sigmas[: len(stamps)].double()
        return Levels(torch.ones_like(sigma), sigma)
    if name.startswith(("FlowMatch", "FlowMap")):
        sigma = scheduler.sigmas[: len(stamps)].double()
        return Levels(1 - sigma, sigma)
    if name == "EulerDiscreteScheduler":
        ratio = scheduler.sigmas[: len(stamps)].double()
        return Levels(1 / torch.hypot(torch.ones_like(ratio), ratio), torch.sin(torch.atan(ratio)))
    bar = scheduler.alphas_cumprod[stamps.long()].double()
    return Levels(bar.sqrt(), (1 - bar).sqrt())


def agree(training: Levels | None, evaluation: Levels, exported: Levels | None = None) -> None:
    """Raise UserError printing the three lists when two of them differ by more than TOLERANCE.

    None: a method without levels of its own, or no export.
    """
    lists = {"training": training, "evaluation": evaluation, "exported scheduler": exported}
    there = {name: levels for name, levels in lists.items() if levels is not None}
    names = list(there)
    gaps = [(there[a].differ(there[b]), a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    worst = max(gaps, default=(0.0, "", ""))
    if worst[0] <= TOLERANCE:
        return
    rows = [f"  {name + ':':20}{lv.shown() if lv is not None else '-'}" for name, lv in lists.items()]
    raise UserError(
        f"schedule: {worst[1]} and {worst[2]} stand at different noise levels (by {worst[0]:.2g}, allowed {TOLERANCE:g});"
        " a student answers well only at the levels it was trained at. sigma / alpha, first to last:\n" + "\n".join(rows)
    )


def trained_levels(method: Any, process: Process, count: int | None = None) -> Levels | None:
    """Levels `steps` that a method trains its student at, of its lists those of `count`; None for one that names none."""
    steps = getattr(method, "steps", None)
    steps = next((own for own in getattr(method, "step_lists", ()) if len(own) == count), steps)
    return levels_of(process, steps) if isinstance(steps, tuple) and steps else None


def check_product(product: Any) -> None:
    """Training against evaluation for an opened run; UserError when they differ."""
    if product.recipe is None or product.fitted is not None or product.sampler.kind == "ode":
        return
    process = product.net.process
    steps = product.sampler.steps
    agree(trained_levels(product.recipe.method, process, len(steps)), levels_of(process, steps))


def _karras_rows(
    config: Mapping[str, Any], num_inference_steps: int | None = None, timesteps: Sequence[int] | None = None
) -> Levels:
    """`levels_of_scheduler` of a CMStochasticIterativeScheduler with this config, without diffusers.

    Row k of its T stands at k / (T - 1) of Karras's spacing (arXiv 2206.00364, eq. 5) from sigma_max to sigma_min.
    """
    count = config["num_train_timesteps"]
    if timesteps is None:
        assert num_inference_steps is not None
        timesteps = [i * (count // num_inference_steps) for i in range(num_inference_steps)]
    spacing = EDM(**{k: config[k] for k in ("sigma_min", "sigma_max", "rho")})
    return levels_of(spacing, [1 - row / (count - 1) for row in sorted(timesteps)])


def check_export(process: Process, steps: Sequence[float], stock: Stock) -> None:
    """The sampler's levels against those of the scheduler that is to be written; UserError when they differ.

    A CMStochasticIterativeScheduler is not built for it: `recipes check` has no use for diffusers then.
    """
    if stock.name == "CMStochasticIterativeScheduler":
        agree(None, levels_of(process, steps), _karras_rows(stock.config, **stock.visits))
    else:
        check_scheduler(process, steps, stock)


def check_scheduler(process: Process, steps: Sequence[float], stock: Stock) -> None:
    """`check_export` of the scheduler itself, as its class in diffusers has it."""
    agree(None, levels_of(process, steps), levels_of_scheduler(stock.scheduler, **stock.visits))
