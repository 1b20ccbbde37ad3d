"""A teacher that helps a student at sampling, without training: corrected, first or refining steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.jump import Solver, ask, solver_step, times_of
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import Process, bc
from fewstep.algebra.rollout import renoise
from fewstep.algebra.sampling import Fresh, Sampler, sample
from fewstep.config import UserError


class Corrected(nn.Module):
    """Distillation++ (arXiv 2412.08871): the student's first answers move toward the teacher's opinion of them.

    At a level t of the sampler the student's x0 is re-noised to the next level s, and x0 becomes
    (1 - weight) x0 + weight D_T(x_s, s): a step of half that size down the score distillation loss.

    Args:
        student, teacher: denoisers of one process.
        sampler: whose levels are visited; levels outside its list are refused.
        weight: lambda in [0, 1]; 0 is the student.
        first: how many of its first steps are corrected (the paper: 1 or 2). The last step never is.
        fresh: noise of the correction at step i, (b, *d).
    """

    def __init__(self, student: Any, teacher: Any, sampler: Sampler, weight: float, fresh: Fresh, first: int = 1) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must lie in [0, 1], not {weight}")
        self.student, self.teacher, self.weight, self.fresh = student, teacher, weight, fresh
        self.process: Process = student.process
        self.times = times_of(sampler.steps, self.process)
        self.first = min(first, len(sampler.steps) - 1)

    @property
    def takes_s(self) -> bool:
        return bool(getattr(self.student, "takes_s", False))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        here = self.student(x, t, cond, **call)
        at = (self.times == t[0].cpu()).nonzero()
        if not len(at):
            raise ValueError(f"level {float(t[0])} is none of the sampler's, {self.times.tolist()}")
        i = int(at[0])
        if i >= self.first or self.weight == 0:
            return here
        s = self.times[i + 1].to(t.device).expand(len(x))
        opinion = self.teacher(renoise(self.process, here.x0, self.fresh(i), s), s, cond).x0
        x0 = here.x0 + self.weight * (opinion - here.x0)
        alpha, sigma = bc(self.process.alpha(t), x), bc(self.process.sigma(t), x)
        return replace(here, x0=x0, eps=(x - alpha * x0) / sigma)


def after_teacher(
    sampler: Sampler,
    student: Any,
    teacher: Any,
    noise: Tensor,
    cond: Any = None,
    fresh: Fresh | None = None,
    *,
    steps: int = 1,
    substeps: int = 1,
    solver: Solver = "ddim",
) -> Tensor:
    """Diversity distillation (arXiv 2503.10637): the teacher takes the first `steps` steps of the sampler's own grid.

    The student, whose first step decides the composition, then draws the rest; 0 steps is the student alone, all
    of them the teacher on that grid. Each of the teacher's is `substeps` solver steps, even in u (the paper: its own
    grid of 20 until the student's second level). Returns x0 (b, *d).
    """
    if not 0 <= steps <= len(sampler.steps):
        raise UserError(f"the teacher's steps must lie in 0..{len(sampler.steps)}, not {steps}")
    process: Process = student.process
    times = times_of(sampler.steps, process).to(noise.device)
    b = len(noise)
    x = process.prior(sampler.noise_scale * noise, times[0].expand(b))
    for i in range(min(steps, len(times) - 1)):
        high, low = sampler.steps[i : i + 2]
        inner = times_of([high + (low - high) * k / substeps for k in range(1, substeps)], process).to(times)
        for t, s in pairwise([times[i], *inner, times[i + 1]]):
            x = solver_step(teacher, x, t.expand(b), s.expand(b), cond, solver)
    if steps == len(times):
        return teacher(x, times[-1].expand(b), cond).x0
    rest = replace(sampler, steps=sampler.steps[steps:])
    later = None if fresh is None else (lambda i: fresh(i + steps))
    return sample(rest, student, noise, cond, later, start=x if steps else None)


def adaptive(
    draw: Callable[[Tensor], Tensor],
    refine: Callable[[Tensor, Tensor], Tensor],
    score: Callable[[Tensor], Tensor],
    index: Tensor,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Adaptive teacher-student collaboration (arXiv 2312.10835): the teacher refines what scores badly.

    Args:
        draw: maps indices (b,) to student samples (b, *d).
        refine: maps (samples, indices) of the rejected rows to better ones.
        score: reward (b,) of samples.
        index: global sample indices (b,).
        threshold: least score that is kept; `percentile` gives it from calibration samples.

    Returns:
        (samples (b, *d), which rows were refined (b,) bool).
    """
    x = draw(index)
    poor = score(x) < threshold
    if bool(poor.any()):
        x = x.clone()
        x[poor] = refine(x[poor], index[poor]).to(x.dtype)
    return x, poor


def percentile(scores: Tensor, k: float) -> float:
    """The score below which k percent lie; 0 refines nothing, 100 everything."""
    if not 0 <= k <= 100:
        raise ValueError(f"k must lie in [0, 100], not {k}")
    if k == 100:
        return float("inf")
    return float("-inf") if k == 0 else float(scores.double().quantile(k / 100))


def noised_again(
    teacher: Any,
    x: Tensor,
    noise: Tensor,
    cond: Any = None,
    *,
    level: float = 0.4,
    steps: int = 4,
    solver: Solver = "heun",
) -> Tensor:
    """SDEdit (arXiv 2108.01073): noise samples x0 (b, *d) to a level u and let the teacher solve back; x0 (b, *d)."""
    process: Process = teacher.process
    levels = torch.tensor([level * (1 - i / steps) for i in range(steps)], dtype=torch.float64)
    times = times_of(levels, process).to(x.device)
    state = renoise(process, x, noise, times[0].expand(len(x)))
    for t, s in pairwise(times):
        state = solver_step(teacher, state, t.expand(len(x)), s.expand(len(x)), cond, solver)
    return ask(teacher, state, times[-1].expand(len(x)), process.grid(0 * times[-1:]), cond).x0
