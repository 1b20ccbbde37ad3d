"""Closed-form players in float64: an affine student, the exact critic of its samples, exact discriminators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import EDM, Flow, Process, bc
from fewstep.methods.method import Turn
from fewstep.networks.analytic import gaussian
from fewstep.networks.roles import Roles

F64 = torch.float64
MEAN, STD = 0.7, 0.4
"""The teacher's Gaussian, as in the golden numbers."""


class Affine(nn.Module):
    """x0 = mean + std z, where z is the prior's noise: at any time for flow, x / t for EDM."""

    def __init__(self, process: Process, mean: float = -1.0, std: float = 1.5) -> None:
        super().__init__()
        self.process = process
        self.mean = nn.Parameter(torch.tensor(mean, dtype=F64))
        self.std = nn.Parameter(torch.tensor(std, dtype=F64))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        z = x / bc(self.process.sigma(t), x)
        return from_x0(self.process, x, t, self.mean + self.std * z)


class Follow(nn.Module):
    """The exact denoiser of an affine student's samples: a critic that is always at its optimum, without gradient."""

    def __init__(self, student: Affine) -> None:
        super().__init__()
        self._student = (student,)
        self.process = student.process

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        mean, var = self._student[0].mean.detach(), self._student[0].std.detach() ** 2
        alpha, sigma = bc(self.process.alpha(t), x), bc(self.process.sigma(t), x)
        gain = alpha * var / (alpha**2 * var + sigma**2)
        return from_x0(self.process, x, t, mean + gain * (x - alpha * mean))


class LogRatio(nn.Module):
    """The optimal discriminator, log p_teacher - log p_student of noised samples, (b, 1); frozen student."""

    taps: tuple[str, ...] = ()

    def __init__(self, student: Affine, mean: float = MEAN, std: float = STD) -> None:
        super().__init__()
        self._student = (student,)
        self.real = (mean, std)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        process = self._student[0].process
        alpha, sigma = bc(process.alpha(t), x), bc(process.sigma(t), x)

        def log_prob(mean: Any, var: Any) -> Tensor:
            spread = alpha**2 * var + sigma**2
            return -0.5 * ((x - alpha * mean) ** 2 / spread + torch.log(spread))

        fake = (self._student[0].mean.detach(), self._student[0].std.detach() ** 2)
        return (log_prob(self.real[0], self.real[1] ** 2) - log_prob(*fake)).flatten(1).mean(1, keepdim=True)


class Scripted(Draws):
    """Draws whose normal numbers are given in order; everything else comes from the usual stream."""

    def __init__(self, normals: list[Tensor], key: int = 3) -> None:
        super().__init__(key, torch.arange(len(normals[0])))
        self.normals = list(normals)

    def normal(self, *shape: int, dtype: torch.dtype = F64) -> Tensor:
        return self.normals.pop(0)


def batch64(size: int = 64, key: int = 5, shape: tuple[int, ...] = (1,), **fields: Any) -> Batch:
    """A batch whose noise is float64."""

    class Double(Draws):
        def normal(self, *shape: int, dtype: torch.dtype = F64) -> Tensor:
            return super().normal(*shape, dtype=F64)

    return Batch(Double(fold(key), torch.arange(size)), shape, **fields)


def midpoints(count: int) -> tuple[Tensor, Tensor]:
    """Two columns (count^2, 1) of normal quantiles: every pair of `count` midpoints."""
    q = torch.special.ndtri((torch.arange(count, dtype=F64) + 0.5) / count)
    a, b = torch.meshgrid(q, q, indexing="ij")
    return a.reshape(-1, 1), b.reshape(-1, 1)


def players(process: Process | None = None, mean: float = MEAN, std: float = STD, **extra: nn.Module) -> Roles:
    """Teacher N(0.7, 0.4^2), affine student N(mean, std^2), exact critic and discriminator."""
    process = process or Flow()
    student = Affine(process, mean, std)
    fixed: dict[str, nn.Module] = {
        "teacher": gaussian(process, MEAN, STD),
        "student": student,
        "critic": Follow(student),
        "discriminator": LogRatio(student),
    }
    return Roles(**{**fixed, **extra})


def turn_of(turns: Iterator[Turn], role: str) -> Turn:
    """The first turn that updates a role."""
    return next(t for t in turns if role in t.updates)


def student_gradient(method: Any, roles: Roles, batch: Batch, step: int = 0) -> Tensor:
    """The student's gradient of one student turn, as a vector."""
    return gradient_of(method, roles, batch, "student", step)


def gradient_of(method: Any, roles: Roles, batch: Batch, role: str, step: int = 0) -> Tensor:
    """A role's gradient of the first turn that updates it."""
    turn = turn_of(method.turns(roles, step), role)
    roles.train_only(*turn.updates)
    for module in roles.values():
        module.zero_grad(set_to_none=True)
    for losses in turn.losses(batch):
        losses.total().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in roles[role].parameters()]
    return torch.cat([g.flatten() for g in grads])


VE = EDM(sigma_max=1000.0)
