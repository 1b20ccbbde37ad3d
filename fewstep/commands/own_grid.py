"""Where a teacher's own pipeline calls its network: another grid than a student's, offered for its many steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.noising import angle_of
from fewstep.algebra.process import DiscreteVP
from fewstep.commands.schedulers import own_scheduler, times_set
from fewstep.config import UserError
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.folder import Folder, read_folder
from fewstep.networks.wrappers import Wrapper

GRIDS = (
    "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
    "stochastic_sampling", "sigma_schedule",
)  # fmt: skip
"""Keys of a scheduler that say where or how it samples, and nothing of the network."""
OFFERED = "`evaluate.teacher_grid: own` draws the teacher's many steps there"
_FAILS = (AssertionError, AttributeError, IndexError, TypeError, ValueError)


def own_levels(folder: Folder, net: Denoiser, size: tuple[int, ...], steps: int) -> Tensor:
    """Levels u in (0, 1], float64 and decreasing, at which the folder's own pipeline calls the network in `steps` steps.

    Those at which a scheduler of second order calls it twice stand once; so it may be fewer, or more where it calls it
    between two of its steps. Raises what its `set_timesteps` raises for steps that it does not take.

    size: of x without its channels, on which a dynamic shift depends.
    """
    wrapper: Any = net.net
    process, scheduler = net.process, own_scheduler(folder)
    mu: dict[str, Any] = {}
    if folder.scheduler.get("use_dynamic_shifting"):
        mu = {"mu": wrapper.mu(folder.scheduler, wrapper.tokens(size), steps=steps)}
    if wrapper.even and "FlowMatch" in type(scheduler).__name__:  # whose pipeline hands it levels
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], **mu)
    elif type(scheduler).__name__ == "SCMScheduler":
        scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    else:
        scheduler.set_timesteps(steps, **mu)
    levels = process.level(times_set(scheduler, process)).unique().flip(0)
    return levels[levels > 1e-6]  # an EDM scheduler ends at its smallest level, which counts as clean


def grid_said(folder: Folder, net: Denoiser, size: tuple[int, ...]) -> tuple[str, bool | None]:
    """(own 4 steps against a student's 1 - i / 4 in words, True), or (why there are none, None)."""
    process, config = net.process, folder.scheduler
    try:
        own = own_levels(folder, net, size, 4)
    except _FAILS as error:
        return f"its scheduler sets no 4 timesteps: {error}", None
    times = process.grid(own)
    shown = ", ".join(f"{level:.4g}" for level in times.tolist())
    keys = [key for key in GRIDS if config.get(key)]
    if not keys and isinstance(process, DiscreteVP) and config.get("timestep_spacing", "trailing") != "trailing":
        keys = ["timestep_spacing"]
    said = f"its own 4 steps stand at t = {shown}" + (f", by its {', '.join(keys)}" if keys else "")
    if config.get("stochastic_sampling"):
        said += "; it re-noises between them"
    if len(own) != 4:
        return f"{said}; a student's 4 elsewhere: {OFFERED}", True
    gap = float((times - process.grid(torch.linspace(1, 0.25, 4, dtype=torch.float64))).abs().max())
    # A thousandth of the grid moves samples by less than a student's own error; of a table it is one row.
    if gap < 1e-3 * process.t_max:
        return f"{said}; a student's there too", True
    return f"{said}; a student's even ones up to {gap:.2g} apart: {OFFERED}", True


def teacher_levels(recipe: Any, teacher: Any, size: tuple[int, ...], steps: int) -> tuple[float, ...]:
    """Levels u of `teacher`, a recipe's as it was built, in the `steps` steps of its folder's own pipeline.

    Raises UserError for a teacher that is no folder, and where its scheduler takes no such number of steps.
    """
    spec = recipe.teacher
    found = [m for m in teacher.modules() if isinstance(m, Denoiser) and isinstance(m.net, Wrapper)]
    if getattr(spec, "name", None) != "diffusers" or not found:
        raise UserError("evaluate.teacher_grid: own is the grid of a diffusers folder; this recipe's teacher is none")
    net, process = found[0], teacher.process
    try:
        own = own_levels(read_folder(spec.folder), net, size, steps)
    except _FAILS as error:
        raise UserError(
            f"evaluate.teacher_grid: the scheduler of {spec.path} takes no {steps} steps: {error}; choose other "
            "evaluate.teacher_steps, or grid even"
        ) from None
    if process != net.process:
        own = process.level(process.t_of_angle(angle_of(net.process, net.process.grid(own))))
    return tuple(own.tolist())
