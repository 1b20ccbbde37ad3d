"""Student trajectories for training: backward simulation through the student's own steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.algebra.draws import Draws
from fewstep.algebra.jump import ask, clean, times_of
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import EDM, Process, bc
from fewstep.algebra.times import TimesPart, Uniform
from fewstep.config import Count, config


@dataclass(frozen=True)
class Passage:
    """A re-noising step of a rollout: from `x_in` (b, *d) at time `t` (b,) to `x_out` at time `s` (b,)."""

    x_in: Tensor
    t: Tensor
    s: Tensor
    x_out: Tensor


@dataclass(frozen=True)
class Rollout:
    """What a student produced: `x` (b, *d) from its input `x_in` at time `t` (b,), and the way there if it was asked."""

    x: Tensor
    x_in: Tensor
    t: Tensor
    way: tuple[Passage, ...] = ()


Path = Literal["renoise", "map"]
"""Between two steps: fresh noise on x0 (DMD2), or the noise that the step itself predicts (DDIM; Euler in a flow)."""


@config
class RandomSteps:
    """Backward simulation at levels drawn anew each time: rCM's for its score difference (arXiv 2510.08431), and CDM's.

    From the prior the student takes `least` to `most` steps, a number for the whole update, at levels drawn row by row.
    """

    most: Count = 4
    """Largest number of steps of an update (CDM: 28)."""
    least: Count = 1
    """Smallest number of steps of an update."""
    order: Literal["lesser", "sorted"] = "lesser"
    """lesser: each level is the lesser of a fresh draw and the one before it, and the last step is trained (rCM).
    sorted: fresh draws in order, and any step, drawn anew, is the one to train (CDM)."""
    times: TimesPart = Uniform(low=0.0, high=1.0, shift=5.0)
    """Law that every level after the first is drawn from (CDM's code: U(0.25, 0.95) or U(0.02, 0.98), shift 1)."""

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise ValueError(f"least must be at most {self.most}, which is `most`, not {self.least}")

    def draw(self, draws: Draws, process: Process) -> list[Tensor]:
        """Times (b,) of the steps up to the one to train, decreasing."""
        first = process.grid(torch.ones(len(draws), dtype=torch.float64, device=draws.device))
        # As many draws whatever the number of steps is, so that later ones do not depend on it.
        fresh = [self.times.sample(draws, process) for _ in range(self.most - 1)]
        count = self.least + exit_step(draws, self.most - self.least + 1)
        if self.order == "sorted":
            stop = draws.shared_integer(count)
            inner = torch.stack([first, *fresh[: count - 1]]).sort(0, descending=True).values
            return list(inner)[: stop + 1]
        times = [first]
        for t in fresh[: count - 1]:
            times.append(torch.minimum(times[-1], t))
        return times


@dataclass(frozen=True)
class StepLists:
    """Lists of steps: an update draws one of them for all its samples, and then the step of it that is trained.

    So one student takes the steps of each (the unified LoRA of Hyper-SD, arXiv 2404.13686, for 1 to 8 steps).
    """

    lists: tuple[tuple[float, ...], ...]

    @property
    def most(self) -> int:
        """Largest number of steps of an update."""
        return max(map(len, self.lists))

    def draw(self, draws: Draws, process: Process) -> list[Tensor]:
        """Times (b,) of the steps up to the one to train, decreasing."""
        steps = self.lists[draws.shared_integer(len(self.lists))]
        times = times_of(steps, process).to(draws.device)
        return [t.expand(len(draws)) for t in times[: exit_step(draws, len(steps)) + 1]]


def listed(steps: tuple[float, ...], lists: tuple[tuple[float, ...], ...]) -> tuple[float, ...] | StepLists:
    """What a rollout takes for a method's `steps` and `step_lists`."""
    return StepLists(lists) if lists else steps


def exit_step(draws: Draws, count: int) -> int:
    """The step at which a rollout stops, the same for every sample, micro-batch and rank of an update."""
    return draws.shared_integer(count) if count > 1 else 0


def renoise_std(process: Process, s: Tensor) -> Tensor:
    """Standard deviation (b,) of the noise that `renoise` adds at times s (b,): sigma_s.

    In EDM an answer stands at sigma_min, not at 0, so the noise added has variance s^2 - sigma_min^2
    (arXiv 2303.01469, alg. 1); diffusers' scheduler does the same, and exports must agree with it.
    """
    sigma = process.sigma(s)
    return torch.sqrt((sigma**2 - process.sigma_min**2).clamp_min(0)) if isinstance(process, EDM) else sigma


def renoise(process: Process, x0: Tensor, eps: Tensor, s: Tensor) -> Tensor:
    """alpha_s x0 + sigma_s eps with fresh noise, see `renoise_std`: a student's way from one step to the next."""
    return bc(process.alpha(s), x0) * x0 + bc(renoise_std(process, s), x0) * eps


def rollout(
    student: Callable[..., Prediction],
    draws: Draws,
    shape: tuple[int, ...],
    steps: tuple[float, ...] | RandomSteps | StepLists,
    cond: Any = None,
    *,
    exit: int | None = None,
    grad: bool = True,
    path: Path = "renoise",
    record: bool = False,
    **call: Any,
) -> Rollout:
    """Backward simulation (DMD2, arXiv 2405.14867, sec. 4.5).

    The student starts from pure noise at the first level and re-noises its own x0 to each next one; only the
    call at the exit step carries a gradient. Without the simulation it would train on noised data, which it
    never sees when it samples.

    Args:
        student: a denoiser with a `process`.
        shape: of one sample, (C, H, W) or (d,).
        steps: levels u, decreasing, or a law or lists of them, of which the step to stop at is drawn too.
        exit: index of the step to stop at; None draws it from the shared stream.
        grad: False runs the last call without a graph too.
        path: how the student gets from step to step.
        record: keep every re-noising step on the way.
        call: further arguments of every call of the student.

    >>> exact = fewstep.load("toy/dmd2").data.open().mixture
    >>> draws = fewstep.Draws(fewstep.fold("rollout"), torch.arange(4))
    >>> made = fewstep.rollout(exact, draws, (2,), (1.0, 0.5), exit=1)
    >>> made.x.shape, made.t
    (torch.Size([4, 2]), tensor([0.5000, 0.5000, 0.5000, 0.5000], dtype=torch.float64))
    """
    process: Process = student.process  # type: ignore[attr-defined]
    if isinstance(steps, RandomSteps | StepLists):
        times, most = steps.draw(draws, process), steps.most
        last = len(times) - 1
    else:
        times = [t.expand(len(draws)) for t in times_of(steps, process).to(draws.device)]
        most, last = len(steps), exit_step(draws, len(steps)) if exit is None else exit
    # All noise is drawn up front, so that the numbers of later draws do not depend on the exit step.
    noise = [draws.normal(*shape) for _ in range(most if path == "renoise" else 1)]
    t = times[0]
    x = process.prior(noise[0], t)
    way: list[Passage] = []
    for i in range(last):
        s = times[i + 1]
        with torch.no_grad():
            if path == "map":
                moved = ask(student, x, t, s, cond, **call).at(s)
            else:
                moved = renoise(process, ask(student, x, t, clean(process, t), cond, **call).x0, noise[i + 1], s)
        way += [Passage(x, t, s, moved)] if record else []
        x, t = moved, s
    with nullcontext() if grad else torch.no_grad():
        out = ask(student, x, t, clean(process, t), cond, **call).x0
    return Rollout(out, x, t, tuple(way))


def unrolled(
    student: Callable[..., Prediction],
    draws: Draws,
    shape: tuple[int, ...],
    steps: tuple[float, ...],
    cond: Any = None,
    *,
    bins: bool = False,
) -> Tensor:
    """Samples x0 (b, *shape) by the student's own jumps from level to level, with the gradient of every step.

    Args:
        steps: levels u, decreasing.
        bins: every level but the first is drawn anew, row by row, from the bin between it and the next one, the last
            from below it to 0 (K-bin sampling, EVE, arXiv 2403.09334, sec. 4.2).
    """
    process: Process = student.process  # type: ignore[attr-defined]
    noise = draws.normal(*shape)
    levels = [torch.full((len(draws),), u, dtype=torch.float64, device=draws.device) for u in steps]
    if bins:
        low = (*steps[1:], 0.0)
        levels = [levels[0], *(u - (u - end) * draws.uniform() for u, end in zip(levels[1:], low[1:], strict=True))]
    times = [process.grid(u) for u in levels]
    x = process.prior(noise, times[0])
    for t, s in pairwise(times):
        x = ask(student, x, t, s, cond).at(s)
    return ask(student, x, times[-1], clean(process, times[-1]), cond).x0


def chunked_rollout(
    student: Callable[..., Prediction],
    draws: Draws,
    shape: tuple[int, ...],
    steps: tuple[float, ...],
    cond: Any = None,
    *,
    chunks: int = 1,
    exit: int | None = None,
    grad: bool = True,
) -> Tensor:
    """Self-forcing (arXiv 2506.08009): a sequence (b, frames, ...) drawn chunk by chunk, each after its own past.

    Every chunk is backward simulation with one exit step for all; the chunks before it, drawn by the student itself
    and cut from the graph, are given as `context` (b, earlier frames, ...), which the first chunk does not get. With
    one chunk it is `rollout`.

    Args:
        shape: of one sequence; its first axis is cut into `chunks` equal parts. Others as in `rollout`.
    """
    if shape[0] % chunks:
        raise ValueError(f"chunks {chunks} must divide the {shape[0]} frames")
    last = exit_step(draws, len(steps)) if exit is None else exit
    part = (shape[0] // chunks, *shape[1:])
    drawn: list[Tensor] = []
    for _ in range(chunks):
        past: dict[str, Any] = {"context": torch.cat([x.detach() for x in drawn], 1)} if drawn else {}
        drawn.append(rollout(student, draws, part, steps, cond, exit=last, grad=grad, **past).x)
    return torch.cat(drawn, 1)
