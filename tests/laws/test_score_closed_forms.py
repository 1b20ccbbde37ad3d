"""Class-ratio's gradient is that of KL; guidance augmentation alone runs away and distribution matching stops it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distribution_cases import (
    F64,
    MEAN,
    STD,
    VE,
    Follow,
    LogRatio,
    Scripted,
    batch64,
    players,
    student_gradient,
)
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import Flow
from fewstep.algebra.rollout import exit_step
from fewstep.algebra.times import Levels, Uniform
from fewstep.methods.class_ratio import ClassRatio
from fewstep.methods.decoupled_dmd import DecoupledDMD
from fewstep.methods.vsd import VSD
from fewstep.networks.analytic import gaussian
from fewstep.networks.roles import Roles
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer

FLOW = Flow()


def sigma_level(sigma: float) -> Levels:
    """The Karras level u of a sigma of the process VE."""
    low, high = VE.sigma_min ** (1 / 7), VE.sigma_max ** (1 / 7)
    return Levels(at=((sigma ** (1 / 7) - low) / (high - low),))


@pytest.mark.parametrize(
    ("sigma", "d_mean", "d_std"),
    [(0.5, -4.1463414634, 3.0585365854), (2.0, -0.4086538462, 0.1205769231)],
)
def test_class_ratio_of_the_reverse_kl_has_the_printed_gradient_of_kl(sigma: float, d_mean: float, d_std: float):
    # Three Gauss-Hermite nodes as a multiset: the plain batch mean is the expectation of the linear score times z.
    nodes = 3**0.5 * torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=F64)
    z, eps = (c.reshape(-1, 1) for c in torch.meshgrid(nodes, nodes, indexing="ij"))
    method = ClassRatio(divergence="rkl", times=sigma_level(sigma))
    found = student_gradient(method, players(VE, -1.0, 1.5), Batch(Scripted([z, eps]), (1,)))
    assert found.tolist() == pytest.approx([d_mean, d_std], abs=2e-10)


@pytest.mark.parametrize("process", [FLOW, VE], ids=["flow", "edm"])
def test_class_ratio_of_the_reverse_kl_is_vsd_weighed_for_kl_on_every_draw(process: Any):
    # grad_x log(p/q) = s_p - s_q, so the logit's gradient is -(alpha^2 / sigma^2)(D_fake - D_real) sample by sample.
    roles = players(process, 0.2, 0.9)
    for key in (1, 2, 3):
        ratio = student_gradient(ClassRatio(divergence="rkl", times=Uniform()), roles, batch64(37, key))
        score = student_gradient(VSD(weight="kl", times=Uniform()), roles, batch64(37, key))
        assert torch.allclose(ratio, score, rtol=1e-9, atol=1e-12)
        assert score.abs().min() > 1e-4


class Standardised(nn.Module):
    """x0 = mean + std z at every level, z the standardised value of the teacher's samples there."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.process = FLOW
        self.mean = nn.Parameter(torch.tensor(mean, dtype=F64))
        self.std = nn.Parameter(torch.tensor(std, dtype=F64))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        alpha, sigma = (1 - t)[:, None], t[:, None]
        z = (x - alpha * MEAN) / torch.hypot(alpha * STD, sigma)
        return from_x0(FLOW, x, t, self.mean + self.std * z)


def cast(mean: float, std: float) -> Roles:
    student: Any = Standardised(mean, std)
    return Roles(
        teacher=gaussian(FLOW, MEAN, STD),
        student=student,
        critic=Follow(student),
        discriminator=LogRatio(student),
    )


@pytest.mark.parametrize(
    "method",
    [
        *(
            DecoupledDMD(guidance=1.0, schedule=s, normalizer=n, steps=(1.0, 0.4))
            for s in ("coupled", "full", "constrained", "hybrid")
            for n in ("shared", "separate")
        ),
        ClassRatio(divergence="rkl", steps=(1.0, 0.4)),
        ClassRatio(divergence="js", steps=(1.0, 0.4)),
        *(VSD(weight=w, steps=(1.0, 0.4)) for w in ("dmd", "one", "kl", "sigma2")),
    ],
    ids=lambda m: "-".join(str(getattr(m, k, "")) for k in ("name", "schedule", "normalizer", "divergence", "weight")),
)  # fmt: skip
def test_a_student_of_two_steps_rests_at_the_optimum(method: Any):
    keys = range(1, 7)
    assert {exit_step(batch64(key=key).draws, 2) for key in keys} == {0, 1}
    for key in keys:
        assert student_gradient(method, cast(MEAN, STD), batch64(key=key)).abs().max() < 1e-9
        assert student_gradient(method, cast(0.2, 0.7), batch64(key=key)).abs().min() > 1e-4


NULL, CLASS_MEANS = 0.1, (0.7, -0.3)
"""Means of the null condition and of two classes; all three Gaussians have the width STD."""


class Guided(nn.Module):
    """An exact conditional denoiser of N(CLASS_MEANS[cond], STD^2), of N(NULL, STD^2) without a class."""

    def __init__(self) -> None:
        super().__init__()
        self.process = FLOW

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        mean = torch.tensor([*CLASS_MEANS, NULL], dtype=F64)[cond][:, None]
        return denoised(x, t, mean, torch.tensor(STD, dtype=F64))


def denoised(x: Tensor, t: Tensor, mean: Tensor, std: Tensor) -> Prediction:
    alpha, sigma = (1 - t)[:, None], t[:, None]
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return from_x0(FLOW, x, t, mean + gain * (x - alpha * mean))


class ByClass(nn.Module):
    """x0 = mean[cond] + std z from pure noise z."""

    def __init__(self, mean: tuple[float, ...], std: float) -> None:
        super().__init__()
        self.process = FLOW
        self.mean = nn.Parameter(torch.tensor(mean, dtype=F64))
        self.std = nn.Parameter(torch.tensor(std, dtype=F64))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        return from_x0(FLOW, x, t, self.mean[cond][:, None] + self.std * x)


class FollowByClass(nn.Module):
    """The exact critic of a `ByClass` student."""

    def __init__(self, student: ByClass) -> None:
        super().__init__()
        self.process = FLOW
        self._student = (student,)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        student = self._student[0]
        return denoised(x, t, student.mean.detach()[cond][:, None], student.std.detach())


def conditional(mean: tuple[float, ...] = (0.0, 0.0), std: float = 0.8) -> Roles:
    student = ByClass(mean, std)
    return Roles(teacher=Guided(), student=student, critic=FollowByClass(student))


def labelled(key: int) -> Batch:
    # Sixteen elements: in one, the normaliser's 1 / |x - D| would have no mean.
    cond = torch.arange(24) % 2
    return batch64(24, key, (16,), cond=cond, null_cond=torch.full_like(cond, 2))


def train(method: DecoupledDMD, steps: int, every: int, falling: bool) -> Tensor:
    """(mean of class 0, mean of class 1, |std|) after every so many Adam steps, rows in time."""
    roles = conditional()
    student: Any = roles.student
    adam = torch.optim.Adam(student.parameters(), lr=0.03)
    path = []
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.03 * (1 - step / steps if falling else 1)
        (losses,) = method.student_losses(roles, labelled(step))
        adam.zero_grad()
        losses.total().backward()
        adam.step()
        if (step + 1) % every == 0:
            path.append(torch.stack((*student.mean.detach(), student.std.detach().abs())))
    return torch.stack(path)


W = 3.0
GUIDED = tuple(NULL + W * (m - NULL) for m in CLASS_MEANS)
"""Where the two terms cancel for equal widths: D_fake - D_c = (w - 1)(D_c - D_null) sample by sample."""


@pytest.mark.parametrize("normalizer", ["shared", "separate", "cfg"])
def test_matching_and_augmentation_cancel_at_the_guided_means(normalizer: Any):
    method = DecoupledDMD(guidance=W, schedule="coupled", normalizer=normalizer)
    assert student_gradient(method, conditional(GUIDED, STD), labelled(1)).abs().max() < 1e-9
    assert student_gradient(method, conditional(CLASS_MEANS, STD), labelled(1)).abs().max() > 0.1


def test_matching_holds_augmentation_at_the_guided_means():
    method = DecoupledDMD(guidance=W, schedule="coupled", normalizer="cfg")
    found = train(method, 250, 250, falling=True)[-1]
    assert found.tolist() == pytest.approx([*GUIDED, STD], abs=1e-3)


def test_augmentation_alone_runs_away_past_the_guided_means():
    # D_c - D_null has one sign everywhere, so nothing ever balances it: over-saturation without end.
    method = DecoupledDMD(guidance=W, regularizer="moments", moments_weight=0.0)
    path = train(method, 300, 50, falling=False)
    # Samples of both classes together: their variance about the null mean is that of the means plus the width's.
    variance = ((path[:, :2] - NULL) ** 2).mean(1) + path[:, 2] ** 2
    growth = variance[1:] - variance[:-1]
    assert (growth > 0).all()
    assert growth[-1] > growth[0]
    assert path[-1, 0] > 2 * GUIDED[0]
    assert path[-1, 1] < 2 * GUIDED[1]


def test_augmentation_with_a_discriminator_runs_as_a_recipe():
    short = [f"before.{i}.steps=2" for i in range(len(load("toy/decoupled-dmd").before))]
    width = ["student.width=16", "train.steps=2", "train.batch=16", "train.log_every=1"]
    heads = ["method.regularizer=gan", "discriminator={trunk: critic, taps: [mid]}"]
    trainer = Trainer(load("toy/decoupled-dmd", [*short, *width, *heads]), None, cpu=True)
    trainer.fit()
    assert trainer.progress.skipped == 0
    found = {k: v for k, v in trainer.last_record.items() if k in ("match", "gan", "discriminator")}
    assert len(found) == 3
    assert all(math.isfinite(v) and v > 0 for v in found.values())
