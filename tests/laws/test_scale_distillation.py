"""Scale distillation (YONOS-SR, arXiv 2401.17258) on a Gaussian: the optimum of training on data, by quieter targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.algebra.process import Flow
from fewstep.methods.denoise import Denoise
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.roles import Roles

N, T = 4, 0.6
"""Pixels of a sample, and the level: alpha .4, sigma .6."""
COVARIANCE = 0.16 * torch.exp(-(torch.arange(N)[:, None] - torch.arange(N)).abs().double() / 2)
PAIRS = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=torch.float64)
MEAN = PAIRS.mean(0, keepdim=True)


class Posterior(nn.Module):
    """E[x0 | x_t, A x0] for zero-mean x0, its picture the columns of cond["image"] (b, k, 1, 1)."""

    def __init__(self, operator: Tensor) -> None:
        super().__init__()
        alpha, sigma = 1 - T, T
        shown = torch.cat((alpha * torch.eye(N, dtype=torch.float64), operator))
        noise = torch.diag(torch.tensor([sigma**2] * N + [0.0] * len(operator), dtype=torch.float64))
        cross = COVARIANCE @ shown.T
        self.gain = nn.Parameter(cross @ torch.linalg.inv(shown @ COVARIANCE @ shown.T + noise))

    def forward(self, x: Tensor, time: Tensor, cond: Any = None, taps: Any = ()) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.cat((x, cond["image"].flatten(1)), 1) @ self.gain.T, {}


class Fixed:
    name = "fixed"

    def sample(self, *_: Any, **__: Any) -> Tensor:
        return torch.full((4 * N,), T, dtype=torch.float64)


class Points:
    """Exactly the moments of (x0, eps), by twice as many points as numbers."""

    def __init__(self) -> None:
        z = (2 * N) ** 0.5 * torch.cat((torch.eye(2 * N), -torch.eye(2 * N))).double()
        self.x0, self.eps = z[:, :N] @ torch.linalg.cholesky(COVARIANCE).T, z[:, N:]
        pictures = {"image": self.x0 @ MEAN.T, "easy": self.x0 @ PAIRS.T}
        self.cond = {k: v[..., None, None] for k, v in pictures.items()}
        self.null_cond, self.draws, self.step = None, None, 0

    def data(self) -> Tensor:
        return self.x0

    def noise(self) -> Tensor:
        return self.eps


def loss(student: nn.Module, teacher: nn.Module | None) -> Tensor:
    method = Denoise(target="data" if teacher is None else "teacher", weight="x0", drop_cond=0.0)
    object.__setattr__(method, "times", Fixed())
    roles = Roles(student=student) if teacher is None else Roles(student=student, teacher=teacher)
    (losses,) = method.losses(roles, Points())  # type: ignore[arg-type]
    return losses.total()


def denoiser(operator: Tensor, see: dict[str, str] | None = None) -> Denoiser:
    net = Denoiser(Posterior(operator), Flow(), "x0", "t")
    net.see = see or {}
    return net


def test_the_error_of_the_hard_picture_is_that_of_the_easy_one_and_the_targets_own_variance():
    hard, easy = denoiser(MEAN), denoiser(PAIRS, {"image": "easy"})
    parts = [float(loss(hard, None)), float(loss(easy, None)), float(loss(hard, easy))]
    assert parts == pytest.approx([0.0609742501, 0.0283253685, 0.0326488816], abs=1e-10)
    assert parts[0] == pytest.approx(parts[1] + parts[2], abs=1e-14)


def test_both_have_one_optimum_and_a_teacher_of_the_same_picture_teaches_nothing_else():
    hard = denoiser(MEAN)
    for teacher in (None, denoiser(PAIRS, {"image": "easy"})):
        (slope,) = torch.autograd.grad(loss(hard, teacher), [*hard.parameters()])
        assert float(slope.abs().max()) < 1e-14
    assert float(loss(hard, denoiser(MEAN)).detach()) == 0
